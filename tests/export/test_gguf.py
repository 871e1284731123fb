"""llama.cpp is the judge: the file it opens is the same model, with the same tokens, template and continuations."""

import json
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import gguf
import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from flows.cli import main as vectorclm
from tests.conftest import llama_cpp, write_random_model
from tests.nn.kinds import KINDS, registered, with_attention
from vectorclm.__main__ import main
from vectorclm.bench.gguf import NEAR_TIE, differing, greedy_differences, hard_strings, spread
from vectorclm.corpus.synthetic_world import WorldConfig, rows
from vectorclm.errors import ConfigError, DataError
from vectorclm.evaluation.bits_per_byte import text_scores
from vectorclm.export.gguf import GGUF_TYPES, export_gguf
from vectorclm.export.llama_cpp import LlamaCpp
from vectorclm.model import CausalLM
from vectorclm.model_config import ModelConfig, write_config
from vectorclm.nn.attention_kinds import ATTENTION_KINDS
from vectorclm.shards.conversations import Turn, render_prompt
from vectorclm.store.model_ref import find_model
from vectorclm.tokenizer import BOS_ID, IM_END, IM_END_ID, SPECIAL_TOKENS, encode, load_tokenizer

CONFIG = ModelConfig(
    vocab_size=4096,
    hidden_size=96,
    intermediate_size=80,  # no multiple of a q8_0 block
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,  # not hidden_size / heads
    max_position_embeddings=128,
    rope_theta=5000.0,
    rms_norm_eps=1e-4,
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """A generated world, and sources of Python's own library: words, digits, indents and other scripts."""
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    world = [str(row["text"]) for row in rows(WorldConfig(seed=3, documents=200, conversations=10), "stories")]
    return [*world, *(path.read_text(encoding="utf-8", errors="replace") for path in library)]


@pytest.fixture(scope="module")
def folder(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model with weights larger than at the start of training, so that differences would show."""
    return write_random_model(tmp_path_factory.mktemp("gguf"), documents, CONFIG, 2_000_000, chat=True)


@pytest.fixture(scope="module")
def model(folder: Path) -> CausalLM:
    return CausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("files")
    return {kind: export_gguf(find_model(str(folder)), kind, place / f"{kind}.gguf") for kind in GGUF_TYPES}


@pytest.fixture(scope="module")
def judge(files: dict[str, Path]) -> LlamaCpp:
    return llama_cpp(files["f32"])


def test_hard_strings_and_documents_get_the_same_ids(
    judge: LlamaCpp, tokenizer: Tokenizer, documents: list[str]
) -> None:
    hard = list(hard_strings(tokenizer))
    assert len(hard) >= 1000
    assert differing(judge, tokenizer, hard) == []
    assert differing(judge, tokenizer, [text[:20_000] for text in documents[:300]]) == []
    for text in hard[:60]:
        assert judge.detokenize(encode(tokenizer, text)) == text


def test_special_tokens_are_such_where_asked_for_and_a_chat_is_read_as_it_was_learnt(
    judge: LlamaCpp, tokenizer: Tokenizer
) -> None:
    for i, token in enumerate(SPECIAL_TOKENS):
        assert judge.tokenize(token, special=True) == [i]
    turns = (("system", "Be brief."), ("user", "Hi  there"), ("assistant", "Yes?"), ("user", "x"))
    conversation = [Turn(role, content) for role, content in turns]
    prompt = judge.prompt([{"role": role, "content": content} for role, content in turns])
    assert [BOS_ID, *judge.tokenize(prompt, special=True)] == render_prompt(tokenizer, conversation)


def test_greedy_continuations_are_ours_but_for_near_ties(
    judge: LlamaCpp, model: CausalLM, tokenizer: Tokenizer, documents: list[str]
) -> None:
    prompts = [[BOS_ID, *encode(tokenizer, text)[:20]] for text in documents[:6]]
    ties = list(greedy_differences(model, judge, prompts, 40))
    assert [tie for tie in ties if not tie.near] == []
    assert len(ties) < 12, ties


def test_a_difference_that_is_no_near_tie_is_found(files: dict[str, Path], model: CausalLM) -> None:
    other = CausalLM(CONFIG)
    other.load_state_dict({name: tensor * 1.1 for name, tensor in model.state_dict().items()})
    ties = list(greedy_differences(other, llama_cpp(files["f32"]), [[BOS_ID, 100, 200, 300]], 60))
    assert any(tie.gap > NEAR_TIE for tie in ties)


def test_every_tokens_probability_is_ours(judge: LlamaCpp, model: CausalLM, tokenizer: Tokenizer) -> None:
    ids = [BOS_ID, *encode(tokenizer, "def 日本 🙂 end\r\n  12345 'tis")]  # with tokens that end amid a character
    with torch.inference_mode():
        ours_TV = model(torch.tensor([ids])).log_softmax(-1)[0]
    for i in range(1, len(ids)):
        assert judge.log_probability(ids[:i], ids[i]) == pytest.approx(float(ours_TV[i - 1, ids[i]]), abs=1e-4)


def test_bits_per_byte_of_each_kind_of_file(
    files: dict[str, Path], model: CausalLM, tokenizer: Tokenizer, documents: list[str]
) -> None:
    text = "".join(documents)[:1200]
    for kind, tolerance in {"f32": 1e-5, "f16": 1e-3, "q8_0": 1e-2}.items():
        judge = llama_cpp(files[kind])
        ours = text_scores(model, tokenizer, text, CPU, judge.longest)
        theirs = judge.text_scores(text)
        assert theirs["tokens"] == ours["tokens"] > judge.longest  # more than one window
        assert theirs["bits_per_byte"] == pytest.approx(ours["bits_per_byte"], rel=tolerance), kind


def test_the_file_holds_each_weight_once_and_what_it_says(files: dict[str, Path], model: CausalLM) -> None:
    reader = gguf.GGUFReader(files["q8_0"])
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert sum(tensor.n_elements for tensor in reader.tensors) == CONFIG.parameters
    assert "output.weight" not in kinds and kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.2.attn_norm.weight"] == "F32"
    (embedding,) = (tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    rounded = gguf.dequantize(embedding.data, embedding.tensor_type)
    wanted = model.model.embed_tokens.weight.detach().numpy()
    assert np.abs(rounded - wanted).max() <= np.abs(wanted).max() / 127
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["llama.rope.freq_base"] == 5000.0 and fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-4)
    assert fields["tokenizer.ggml.eos_token_id"] == IM_END_ID and IM_END in fields["tokenizer.chat_template"]


def test_equal_models_give_equal_bytes_from_the_command_line(
    folder: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "again.gguf"
    assert main(["export", str(folder), "--format", "gguf", "--type", "q8_0", "--out", str(out)]) == 0
    assert out.read_bytes() == files["q8_0"].read_bytes() and list(tmp_path.iterdir()) == [out]
    (tmp_path / "text.txt").write_text("The otter swims.")
    capsys.readouterr()
    if find_spec("xllamacpp") is not None:
        assert main(["evaluate", str(out), "--text", str(tmp_path / "text.txt"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["bytes"] == 16


def test_without_a_name_the_file_is_named_by_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By GGUF's convention, with the content as the version; a model of the same shape has a name of its own."""
    monkeypatch.chdir(tmp_path)
    found = find_model(str(folder))
    other = shutil.copytree(folder, tmp_path / "other")
    model = CausalLM.from_pretrained(other)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.save_pretrained(other)
    names = {str(export_gguf(found, "f16")), str(export_gguf(find_model(str(other)), "f16"))}
    assert len(names) == 2 and f"vectorclm-610K-chat-{found.content[:8]}-F16.gguf" in names
    assert export_gguf(found, "f16").is_file()  # the same file again


def test_another_file_is_never_overwritten(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.gguf"
    out.write_text("mine")
    assert main(["export", str(folder), "--format", "gguf", "--out", str(out)]) == 2
    assert "is there already, with other content: remove it" in capsys.readouterr().err
    assert out.read_text() == "mine" and list(tmp_path.iterdir()) == [out]


def test_only_this_process_may_ask_llama_cpp(judge: LlamaCpp) -> None:
    client = httpx.Client(base_url=judge._server.listening_address, headers={"Origin": "http://evil.test"})
    asked = {"/tokenize": {"content": "a"}, "/completion": {"prompt": [0, 5], "n_predict": 1}, "/props": {"a": 1}}
    for headers in ({}, {"Authorization": "Bearer guessed"}, {"X-Api-Key": "guessed"}):
        for path, body in asked.items():
            assert client.post(path, json=body, headers=headers).status_code == 401
        assert client.get("/slots", headers=headers).status_code in (401, 403)
    assert judge.tokenize("a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--type", "f16"], "need --format gguf"),
        ([], "is a model: add --format gguf"),
        (["--format", "gguf", "--out", "no/such/folder/x.gguf"], "cannot be written: No such file"),
    ],
)
def test_what_cannot_be_written_is_told(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err


def copied(folder: Path, out: Path) -> Path:
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return out


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("normalizer",), {"type": "NFKC"}, "normalizer"),
        (("pre_tokenizer", "add_prefix_space"), True, r"add_prefix_space is True, not False"),
        (("model", "ignore_merges"), True, "ignore_merges"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(
    folder: Path, tmp_path: Path, path: tuple[str, ...], value: object, message: str
) -> None:
    other = copied(folder, tmp_path / "model")
    raw = json.loads((other / "tokenizer.json").read_text())
    place = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (other / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match=message):
        export_gguf(find_model(str(other)), "f16", tmp_path / "x.gguf")
    assert not list(tmp_path.glob("*x.gguf*"))


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_the_models_attention_or_there_is_no_file(folder: Path, tmp_path: Path, kind: str) -> None:
    other, out = copied(folder, tmp_path / "model"), tmp_path / "x.gguf"
    with registered(kind):
        write_config(with_attention(CONFIG, kind), other)
        if not ATTENTION_KINDS[kind].is_causal:  # type: ignore[index]
            with pytest.raises(DataError, match=rf"{kind} attention, .* use the model without a GGUF file$"):
                export_gguf(find_model(str(other)), "f32", out)
            assert not list(tmp_path.glob("*.gguf*"))
            return
        export_gguf(find_model(str(other)), "f32", out)
        ids = [BOS_ID, *range(100, 160)]
        with torch.inference_mode():
            ours_V = CausalLM.from_pretrained(other).eval()(torch.tensor([ids]))[0, -1].log_softmax(-1)
    likeliest = int(ours_V.argmax())
    assert llama_cpp(out).log_probability(ids, likeliest) == pytest.approx(float(ours_V[likeliest]), abs=1e-4)


def test_a_weight_that_fp16_cannot_hold_is_refused(folder: Path, tmp_path: Path) -> None:
    other = copied(folder, tmp_path / "model")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.up_proj.* f16 cannot hold: export it as f32"):
        export_gguf(find_model(str(other)), "f16", tmp_path / "x.gguf")
    export_gguf(find_model(str(other)), "f32", tmp_path / "x.gguf")
    export_gguf(find_model(str(other)), "q8_0", tmp_path / "y.gguf")  # its blocks have a scale each


def test_the_bench_takes_documents_from_everywhere_and_asks_for_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert spread(list("abcdef"), 3) == ["a", "c", "e"] and spread(["a"], 3) == ["a"]
    assert vectorclm(["bench", "gguf"]) == 2
    assert "--model requires an argument" in capsys.readouterr().err


def test_what_is_no_gguf_file_is_named(tmp_path: Path) -> None:
    if find_spec("xllamacpp") is None:
        with pytest.raises(ConfigError, match="not installed"):
            LlamaCpp(tmp_path)
        return
    (tmp_path / "x.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match="is not a GGUF file"):
        LlamaCpp(tmp_path / "x.gguf")


def test_a_folder_and_a_file_of_one_model_have_the_same_figure_also_with_a_byte_order_mark(
    folder: Path, files: dict[str, Path], documents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama_cpp(files["f32"])  # skips where it is not installed
    text = "".join(documents)[:900]
    figures = set()
    for start in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "text.txt").write_bytes(start + text.encode())
        for model in (folder, files["f32"]):
            assert main(["evaluate", str(model), "--text", str(tmp_path / "text.txt"), "--json"]) == 0
            said = capsys.readouterr()
            assert "evaluate text" in said.err and "100%" in said.err  # a bar while it is scored
            scores = json.loads(said.out)
            assert scores["tokens"] > CONFIG.max_position_embeddings
            figures.add((scores["tokens"], scores["bytes"], round(scores["bits_per_byte"], 4)))
    assert len(figures) == 1
