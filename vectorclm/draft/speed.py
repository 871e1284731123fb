"""The speed of this machine with a model, measured for a few seconds: training, reading and writing tokens.

The figures are those of the machine at rest. Other programs slow each pass down, most of all where its threads wait for
each other. So where a pass takes clearly longer than its threads work, one thread is measured by the time that it
works, and the others count by what they usually add.
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from vectorclm.inference.decode import decoding
from vectorclm.model import CausalLM
from vectorclm.model_config import ModelConfig
from vectorclm.nn.attention import Documents
from vectorclm.runtime.devices import Runtime
from vectorclm.training.optimizers import OptimizerConfig, build_optimizers

MEASURE_SECONDS = 3.0  # of training steps, after one that warms up
LEAST_STEPS = 4
PASS_FLOPS = 2e10  # of one pass on a CPU: some tenths of a second on two cores
LEAST_TOKENS = 128
LARGE, FEW_LAYERS = 10_000_000, 1  # parameters, above which a CPU measures a part of the model
WRITTEN_TOKENS = 24
PLAIN_SECONDS = 0.0032  # of `_plain_work` on one core of an AMD EPYC (Zen 5), on which the rates below were measured
BUSY = 1.3  # times as long as its threads worked: a pass beside other programs
GAIN = 0.8  # what each further thread adds, in threads


class Training(NamedTuple):
    """The settings of a training that decide its speed."""

    length: int  # tokens in a window
    windows: int  # in a step
    document_tokens: int | None = None  # of a typical document where a token sees its own alone; None = whole windows


class MachineSpeed(NamedTuple):
    """Tokens per second of a model on this machine."""

    training: float  # in steps
    reading: float  # in forward passes over many windows
    writing: float  # of one answer
    plain: float  # of Python and of data work, relative to the machine of PLAIN_SECONDS
    busy: bool = False  # whether other programs took time from the measurement


def training_speed(model: ModelConfig, length: int, windows: int, runtime: Runtime) -> float:
    """Tokens per second of training steps of `windows` windows; see `machine_speed`."""
    return machine_speed(model, Training(length, windows), runtime, answers=False).training


def machine_speed(model: ModelConfig, training: Training, runtime: Runtime, *, answers: bool = True) -> MachineSpeed:
    """Measure a model on random tokens, with the windows of one step that fit in memory at once.

    The optimizer's step is counted as often as in a training. Of a large model, a CPU measures a few layers and fewer
    tokens. Without `answers`, writing is not measured and 0.
    """
    device = runtime.configure_torch()
    part = model
    if device.type == "cpu" and model.parameters > LARGE:
        part = model.model_copy(update={"num_hidden_layers": min(FEW_LAYERS, model.num_hidden_layers)})
    length, windows = training.length, training.windows
    share = part.flops_per_token(length) / model.flops_per_token(length)
    at_once, width = min(windows, runtime.windows_at_once(length, device)), length
    if device.type == "cpu":
        allowed = max(LEAST_TOKENS, int(PASS_FLOPS / part.flops_per_token(length)))
        at_once, width = max(1, min(at_once, allowed // length)), min(length, allowed)
    torch.manual_seed(0)
    decoder = CausalLM(part).to(device)
    optimizers = build_optimizers(decoder, OptimizerConfig(learning_rate=1e-4, adamw_learning_rate=1e-4))
    tokens = torch.randint(5, model.vocab_size, (at_once, width), device=device)
    documents = _documents(training.document_tokens, at_once, width, device)

    def gradients() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = decoder.loss(tokens, tokens, documents)
        loss.backward()  # type: ignore[no-untyped-call]

    def update() -> None:
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    @torch.inference_mode()
    def read() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            decoder.logits(decoder.model(tokens, documents=documents))

    timer = _Timer(device, gradients)
    timer(update)
    passes: list[_Seconds] = []
    updates: list[_Seconds] = []
    began = time.perf_counter()
    while len(passes) < LEAST_STEPS or time.perf_counter() - began < MEASURE_SECONDS:
        passes.append(timer(gradients))
        updates.append(timer(update))
    measured = at_once * width
    seconds = timer.at_rest(passes) * windows * length / measured + timer.at_rest(updates)
    reading = measured / timer.at_rest([timer(read) for _ in range(1 + LEAST_STEPS)])
    writing = _writing(decoder, model.parameters / part.parameters, timer) if answers else 0.0
    gain = timer.gain * share
    return MachineSpeed(windows * length / seconds * gain, reading * gain, writing, _plain(), timer.busy)


class _Seconds(NamedTuple):
    """The time of one pass, and how long all threads worked in it."""

    wall: float
    worked: float


class _Timer:
    """Times passes on a device: with all threads, or with one where other programs take time from the first passes."""

    def __init__(self, device: torch.device, work: Callable[[], object]) -> None:
        self.device, self.busy, self.gain = device, False, 1.0
        threads = torch.get_num_threads()
        self(work)  # warms up
        passes = [self(work) for _ in range(LEAST_STEPS)]
        worked = min(found.worked for found in passes) / threads
        if device.type == "cpu" and min(found.wall for found in passes) > BUSY * worked:
            torch.set_num_threads(1)
            self.busy, self.gain = True, 1 + GAIN * (threads - 1)

    def __call__(self, work: Callable[[], object]) -> _Seconds:
        began, worked = time.perf_counter(), time.process_time()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return _Seconds(time.perf_counter() - began, time.process_time() - worked)

    def at_rest(self, passes: Sequence[_Seconds]) -> float:
        """The time of the fastest pass without other programs, with the threads of the timer."""
        return min(found.worked if self.busy else found.wall for found in passes)


def _documents(tokens: int | None, at_once: int, width: int, device: torch.device) -> Documents | None:
    """The boundaries of documents of so many tokens in each window."""
    if tokens is None:
        return None
    positions = torch.arange(width) % max(1, min(tokens, width))
    return Documents.at(positions.expand(at_once, width).contiguous(), device)


@torch.inference_mode()
def _writing(decoder: CausalLM, larger: float, timer: _Timer) -> float:
    """Tokens per second of one answer by a model that is so many times as large."""
    decoder.eval()
    device = decoder.model.embed_tokens.weight.device
    next_logits = decoding(decoder, 1, min(decoder.config.max_position_embeddings, 2 * WRITTEN_TOKENS))
    fed = torch.full((1, 4), 5, device=device)

    def write() -> None:
        nonlocal fed
        fed = torch.tensor([[int(next_logits(fed)[0].argmax())]], device=device)

    passes = [timer(write) for _ in range(min(WRITTEN_TOKENS, decoder.config.max_position_embeddings - 4))]
    return 1 / (timer.at_rest(passes) * larger)


def _plain() -> float:
    """The speed of one core in Python and data work, relative to the machine of PLAIN_SECONDS."""
    times = []
    for _ in range(8):
        began = time.thread_time()
        _plain_work()
        times.append(time.thread_time() - began)
    return PLAIN_SECONDS / min(times)


def _plain_work() -> None:
    rows = [{"text": f"{number} " * 40, "id": number} for number in range(1000)]
    for line in [json.dumps(row) for row in rows]:
        json.loads(line)["text"].encode().split()
