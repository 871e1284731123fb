"""One step of the loop, for pretraining and for tuning: the loss and gradient are transformers', the figures pinned."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.test_model import CONFIG
from vectorclm.dataset import Batch
from vectorclm.errors import DivergedError
from vectorclm.model import CausalLM
from vectorclm.nn.loss import IGNORE_INDEX
from vectorclm.train_step import TrainStep
from vectorclm.training.metrics import DIVERGED_STEPS, SPIKE_STEPS, Metrics, is_divergence, is_spike
from vectorclm.training.optimizers import OptimizerConfig, build_optimizers

IDS = torch.randint(5, CONFIG.vocab_size, (6, 32), generator=torch.Generator().manual_seed(3))


def pretraining() -> Batch:
    return Batch(IDS, IDS)


def tuning() -> Batch:
    """Conversations: of each window another share is the assistant's."""
    labels = IDS.clone()
    for row, first in enumerate((4, 30, 12, 31, 20, 9)):
        labels[row, :first] = IGNORE_INDEX
    return Batch(IDS, labels)


@pytest.fixture
def model() -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(CONFIG)


@pytest.mark.parametrize(
    ("batch", "pinned_loss", "pinned_norm", "pinned_next"),
    [(pretraining(), 5.735619, 0.889037, 5.382790), (tuning(), 5.738052, 1.213601, 5.333033)],
    ids=["pretraining", "tuning"],
)
def test_one_step(
    model: CausalLM, batch: Batch, pinned_loss: float, pinned_norm: float, pinned_next: float, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    judge = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = judge(input_ids=batch.input_ids, labels=batch.labels).loss
    theirs.backward()
    norm_of_theirs = torch.nn.utils.get_total_norm([p.grad for p in judge.parameters()])

    optimizers = build_optimizers(model, OptimizerConfig(learning_rate=0.02, adamw_learning_rate=0.006))
    loss, norm = TrainStep(model, optimizers, 1e9, 4)(batch)  # 4: micro-batches of unequal size
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-5)
    assert float(norm) == pytest.approx(float(norm_of_theirs), rel=1e-4)

    after, _ = TrainStep(model, optimizers, 1e9, 6)(batch)
    assert float(after) < float(loss)
    assert (float(loss), float(norm)) == pytest.approx((pinned_loss, pinned_norm), rel=1e-4)
    assert float(after) == pytest.approx(pinned_next, rel=1e-3)


def test_a_spike_stands_out_from_the_steps_before() -> None:
    before = [3.0 + 0.02 * (step % 5) for step in range(SPIKE_STEPS)]
    assert is_spike(before, 3.6) and not is_spike(before, 3.2) and not is_spike(before[1:], 9.0)


def test_a_loss_far_above_the_first_has_diverged() -> None:
    first = [4.0] * 10
    assert is_divergence(first + [8.5] * DIVERGED_STEPS)
    assert not is_divergence(first + [8.5] * (DIVERGED_STEPS - 1) + [3.0] * DIVERGED_STEPS)
    assert not is_divergence(first + [7.0] * DIVERGED_STEPS)


@pytest.mark.parametrize("bad", [(float("nan"), 1.0), (2.0, float("inf"))])
def test_what_is_not_finite_ends_the_run_at_its_step_and_names_the_windows(
    tmp_path: Path, bad: tuple[float, float]
) -> None:
    """What was good before it is written; nothing after it is."""
    metrics = Metrics(tmp_path / "metrics.jsonl", lambda step: f"stories/train-00000.arrow {step}")
    metrics.restart("")
    for step, (loss, norm) in enumerate([(3.0, 1.0), bad, (2.5, 1.0)], 1):
        metrics.add(step, 10 * step, torch.tensor(loss), torch.tensor(norm), 0.1)
    with pytest.raises(DivergedError, match=r"in step 2: .* stories/train-00000\.arrow 1\. .*checkpoints .* kept"):
        metrics.flush()
    step, event = (json.loads(line) for line in metrics.text().splitlines())
    assert (step["step"], event["step"], event["tokens"]) == (1, 2, 20)
    assert event["event"]["kind"] == "not_finite" and event["event"]["windows"] == "stories/train-00000.arrow 1"


def test_a_divergence_is_told_with_the_windows_of_where_it_began(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", lambda step: f"stories/train-00000.arrow {step}")
    metrics.restart("")
    strays = []
    with pytest.raises(DivergedError, match=r"divergence in step 21: from there to step 60 .* stories\S+ 20\. "):
        for step in range(1, 100):
            metrics.add(step, 10 * step, torch.tensor(4.0 if step <= 20 else 80.0), torch.tensor(1.0), 0.1)
            metrics.flush()
            strays.append(metrics.is_diverging)
    assert strays.index(True) + 1 == 21  # from here on no checkpoint is written
    event = json.loads(metrics.text().splitlines()[-1])
    assert (event["step"], event["tokens"], event["event"]["kind"]) == (21, 210, "divergence")


def test_an_end_far_above_the_start_has_diverged_however_short_the_training(tmp_path: Path) -> None:
    losses = [5.2, 88.0, 60.0, 40.0, 25.0, 20.0, *[15.0] * 4, *[11.1] * 10]
    for number, values in enumerate((losses, losses[:5], [5.2, *[6.0] * 19], [88.0, *losses])):
        metrics = Metrics(tmp_path / f"{number}.jsonl", lambda step: f"stories/train-00000.arrow {step}")
        metrics.restart("")
        for step, loss in enumerate(values, 1):
            metrics.add(step, 10 * step, torch.tensor(loss), torch.tensor(1.0), 0.1)
        metrics.flush()
        if number > 1:
            metrics.check_end()
            continue
        with pytest.raises(DivergedError, match=r"divergence in step 2: .* far above its first value 5\.200.* stories"):
            metrics.check_end()
        event = json.loads(metrics.text().splitlines()[-1])
        assert (event["step"], event["tokens"], event["event"]["kind"]) == (2, 20, "divergence")


def test_a_spike_is_logged_with_its_windows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", lambda step: f"lessons/train-00001.arrow {step}")
    metrics.restart("")
    for step in range(1, SPIKE_STEPS + 2):
        loss = 9.0 if step == SPIKE_STEPS + 1 else 3.0 + 0.01 * (step % 3)
        metrics.add(step, 10 * step, torch.tensor(loss), torch.tensor(1.0), 0.1)
    metrics.flush()
    windows, step = f"lessons/train-00001.arrow {SPIKE_STEPS}", SPIKE_STEPS + 1
    assert caplog.messages == [f"spike in step {step}: loss 9.000, after 3.020; its windows are {windows}"]
    (event,) = [line for line in map(json.loads, metrics.text().splitlines()) if "event" in line]
    told = {"kind": "spike", "told": "loss 9.000, after 3.020", "windows": windows}
    assert event == {"step": step, "tokens": 10 * step, "event": told}
    losses = list(metrics.losses)
    metrics.restart(metrics.text())  # as a resume does
    assert metrics.losses == losses
