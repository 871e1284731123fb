"""What runs on a GPU, judged without one: the same figures, whole for a compiler, and no wait inside a step."""

import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo import maybe_mark_dynamic
from torch._dynamo.testing import CompileCounterWithBackend

from tests.nn.kinds import KINDS, registered, with_attention
from tests.test_model import CONFIG
from vectorclm.bench.gpu import NEAR, ROWS, DeviceLoad, _gradients_apart, gpu, measured
from vectorclm.config import changed, load_experiment
from vectorclm.dataset import Batch
from vectorclm.inference.decode import SteadyDecoding, decoding
from vectorclm.model import CausalLM
from vectorclm.nn.attention import Documents
from vectorclm.nn.layers import StackedLinear
from vectorclm.train_step import TrainStep, loss_function
from vectorclm.training.muon import Muon, WeightDecay

IDS = torch.randint(5, CONFIG.vocab_size, (4, 32), generator=torch.Generator().manual_seed(3))


def model() -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(CONFIG)


@pytest.mark.parametrize("padding", [None, (0, 3, 12, 17)])
@pytest.mark.parametrize("kind", KINDS)
def test_steady_steps_are_those_of_a_growing_cache(kind: str, padding: tuple[int, ...] | None) -> None:
    torch.manual_seed(0)
    net = CausalLM(with_attention(CONFIG, kind)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p *= 4.0  # so that attention is no average
    padding_B = None if padding is None else torch.tensor(padding)
    steady, growing = SteadyDecoding(net, 4, 32, padding_B, captured=False), decoding(net, 4, 32, padding_B)
    for begin, end in [(0, 20), *((place, place + 1) for place in range(20, 32))]:
        with registered(kind), torch.inference_mode():
            mine, other = steady(IDS[:, begin:end]), growing(IDS[:, begin:end])
        assert (mine - other).abs().max() < 1e-4 * other.abs().max()


def test_a_prompt_of_one_token_is_a_step_like_any_other() -> None:
    net = model().eval()
    steady = SteadyDecoding(net, 4, 32, captured=False)
    with torch.inference_mode():
        for place in range(3):
            logits = steady(IDS[:, place : place + 1])
        assert (logits - net(IDS[:, :3])[:, -1]).abs().max() < 1e-5


def gradients(net: CausalLM, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(net.parameters())))


@pytest.mark.parametrize("again", [False, True])
def test_the_loss_compiles_whole_and_is_the_same(again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fullgraph` raises where anything would be left to Python; the figures are in full and in half precision.

    With activation checkpointing (`again`) as without.
    """
    monkeypatch.setattr("vectorclm.nn.loss.CHUNK", 50)  # several, the last one shorter
    net = model()
    net.model.activation_checkpointing = again
    compiled = torch.compile(net.loss, fullgraph=True, backend="aot_eager")
    exact = net.loss(IDS, IDS)
    expected = gradients(net, exact)
    for loss_of, half, near in ((compiled, False, 1e-5), (compiled, True, 0.03), (net.loss, True, 0.03)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss = loss_of(IDS, IDS, None)
        assert loss.dtype == torch.float32 and abs(loss.item() / exact.item() - 1) < near
        for mine, other in zip(gradients(net, loss), expected, strict=True):
            assert mine.dtype == torch.float32  # as the master weights
            assert (mine - other).norm() < near * other.norm()


def test_an_environment_variable_leaves_the_loss_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss that a GPU would compile; without a compiler it then computes, by itself."""
    monkeypatch.setattr("vectorclm.train_step.has_flash", lambda device: True)
    net, device = model(), torch.device("cuda")
    assert loss_function(net, device) != net.loss
    source = (
        "import torch; from vectorclm import train_step; from tests.nn.test_gpu_path import IDS, model; "
        "train_step.has_flash = lambda device: True; net = model(); "
        "loss_of = train_step.loss_function(net, torch.device('cuda')); "
        "print(loss_of == net.loss, torch.equal(loss_of(IDS, IDS, None), net.loss(IDS, IDS, None)))"
    )
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "CXX": "no-compiler", "CC": "no-compiler"}
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "True True\n", done.stderr


def test_a_step_asks_the_device_for_no_value() -> None:
    """Tensors of the meta device have none: whatever waits for one raises."""
    device = torch.device("meta")
    net = model().to(device)
    stacked = {m.weight: list(m.rows.values()) for m in net.modules() if isinstance(m, StackedLinear)}
    hidden = [p for name, p in net.named_parameters() if p.ndim == 2 and ".layers." in name]
    rest = [p for name, p in net.named_parameters() if p.ndim == 1 or ".layers." not in name]
    muon = Muon(hidden, 0.01, 0.95, WeightDecay(0.1, cautious=True), stacked=stacked)
    adamw = torch.optim.AdamW(rest, 0.01, foreach=True)  # fused, it takes no such tensors
    before = hidden[0]._version
    loss, norm = TrainStep(net, [muon, adamw], 1.0, 2)(Batch(IDS, IDS))
    assert loss.is_meta and norm.is_meta and hidden[0]._version > before


def test_bench_gpu_says_that_there_is_none() -> None:
    rows = list(gpu(1, "tiny"))
    if torch.cuda.is_available():
        assert all(row.ours is not None for row in rows)
    else:
        assert [row.name for row in rows] == [f"tiny: {name}" for name in ROWS]
        assert all(row.met is None and row.why == "torch sees no GPU here" for row in rows)


def test_its_rows_and_profile_on_a_cpu() -> None:
    tiny = changed(load_experiment("tiny")[0], {"pretrain.batch_size": 4, "model.num_hidden_layers": 1})
    rows = {
        row.name.removeprefix("tiny: "): row
        for row in measured(DeviceLoad(tiny, torch.device("cpu"), 2, 1, 1e9), 1, "")
    }
    assert list(rows)[: len(ROWS)] == list(ROWS)
    whole = rows["tokens a second, whole windows"]
    cost = tiny.model.flops_per_token(tiny.shards.sequence_length)
    assert whole.ours and rows["share of the peak (6N and attention)"].ours == pytest.approx(
        whole.ours * cost / 1e9, rel=1e-3
    )
    assert rows["decoding by CUDA graph, batch 1"].why.startswith("192 of 192 tokens are equal")
    assert rows["gradients, farthest from a CPU's in full precision"].ours == 0  # which this is
    parts = [row for name, row in rows.items() if name.startswith("a step's ")]
    assert sum(row.ours or 0 for row in parts) == pytest.approx(parts[0].peer, rel=1e-3)
    assert rows["a step's matrix products"].ours and rows["a step's attention"].ours
    assert "flash" in rows["attention by a fused kernel"].why


def test_documents_apart_compile_whole_and_once() -> None:
    """By FlashAttention's kernel, of which the meta device knows the shapes; what asks for a value raises here, too."""
    device, compiler = torch.device("meta"), CompileCounterWithBackend("aot_eager")
    net = model().to(device, torch.bfloat16)
    ids = torch.empty(4, 32, dtype=torch.long, device=device)
    compiled = torch.compile(net.loss, fullgraph=True, backend=compiler)
    for number in (9, 14, 30):
        documents = Documents(ids, torch.empty(number, dtype=torch.int32, device=device), flash=True)
        maybe_mark_dynamic(documents.cu_seqlens, 0)
        net.zero_grad()
        compiled(ids, ids, documents).backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())
    assert compiler.frame_count == 1
    with pytest.raises(RuntimeError, match="meta"):  # document by document
        net.loss(ids, ids, documents._replace(flash=False))


def test_a_kind_under_a_mask_compiles_whole_and_is_the_same() -> None:
    torch.manual_seed(0)
    net = CausalLM(with_attention(CONFIG.model_copy(update={"num_hidden_layers": 2}), "alternating"))
    documents = Documents.at(torch.cat([torch.arange(20), torch.arange(12)]).expand(4, -1), torch.device("cpu"))
    compiled = torch.compile(net.loss, fullgraph=True, backend="aot_eager")
    with registered("alternating"):
        for apart in (None, documents):
            exact, loss = net.loss(IDS, IDS, apart), compiled(IDS, IDS, apart)
            assert abs(loss.item() / exact.item() - 1) < 1e-5
            for mine, other in zip(gradients(net, loss), gradients(net, exact), strict=True):
                assert (mine - other).norm() < 1e-4 * other.norm()


@pytest.mark.parametrize("wrong", [torch.nan, 0.0])
def test_gradients_that_are_wrong_are_seen(monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    tiny = changed(load_experiment("tiny")[0], {"pretrain.batch_size": 4, "model.num_hidden_layers": 1})
    monkeypatch.setattr("vectorclm.bench.gpu.loss_function", lambda net, _: lambda *batch: net.loss(*batch) * wrong)
    distance = _gradients_apart(DeviceLoad(tiny, torch.device("cpu"), 2, 1, 1e9))
    assert not distance <= NEAR
