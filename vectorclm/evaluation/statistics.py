"""Statistics of scores: standard errors, confidence intervals, and differences beyond noise."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vectorclm.evaluation.instruction_checks import PARTS

SEED = 20_240_229
DRAWS = 10_000
CONFIDENCE = 1.96  # standard errors on each side of a 95 % interval
CHUNK = 4_000_000  # counts in memory at a time
LEAST = 6  # items that differ; with 5, a sign test cannot reach 5 %: 2 / 2**5 = 6 %


class Scored(NamedTuple):
    """One score, item by item: the score is the sum of `parts` over the sum of `sizes`."""

    ids: list[str]
    parts: NDArray[np.float64]  # [N]: 1 where the answer is right; of text, bits
    sizes: NDArray[np.float64]  # [N]: 1; of text, bytes


def ratio(parts: Sequence[float], sizes: Sequence[float]) -> tuple[float, float]:
    """Sum of `parts` over sum of `sizes`, and the standard error of that ratio (Cochran, Sampling Techniques, 6.4).

    One document does not show how much documents differ: its error is the ratio itself.
    """
    total, count = max(1, sum(sizes)), len(sizes)
    value = sum(parts) / total
    if count < 2:
        return value, value
    squares = sum((part - value * size) ** 2 for part, size in zip(parts, sizes, strict=True))
    return value, math.sqrt(squares * count / (count - 1)) / total


def share_stderr(share: float, items: int) -> float:
    """The standard error of a share of `items`, from the unbiased variance (as lm-evaluation-harness has it)."""
    return math.sqrt(share * (1 - share) / max(1, items - 1))


def share_error(share: float, items: int) -> float:
    """The standard error of a share, that is honest for few items and for a share of 0 or 1, too.

    Where the usual error is too small, it is the one whose 95 % interval reaches as far as Wilson's (JASA 22, 1927):
    one item of one that is right has an error of 0.41, and not of 0.
    """
    if not items or not 0 <= share <= 1:
        return 1.0
    square = CONFIDENCE**2 / items
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    reach = max(share - max(0.0, middle - half), min(1.0, middle + half) - share)
    return max(share_stderr(share, items), reach / CONFIDENCE)


def wilson_interval(share: float, items: int) -> tuple[float, float]:
    """The 95 % interval of a share of `items` (Wilson, JASA 22, 1927), which also holds at 0 and 1."""
    from scipy.stats import binomtest  # takes a second, which trainings need not wait for

    if not items:
        return 0.0, 1.0
    found = binomtest(round(share * items), items).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


class Interval(NamedTuple):
    """The 95 % interval of a paired difference."""

    low: float
    high: float
    items: int
    differing: int  # items with different scores of the two models

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval excludes 0, and enough items differ."""
        return self.differing >= LEAST and not self.low <= 0 <= self.high


def resampled(name: str, before: Scored, after: Scored) -> NDArray[np.float64]:
    """The paired bootstrap: the difference of a score on each of DRAWS draws of items with replacement.

    Both models are scored on the same draw (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13;
    for language models, Koehn, "Statistical Significance Tests for Machine Translation Evaluation", 2004). The counts
    of distinct outcomes in a draw are multinomial, so thousands of questions cost as much as three outcomes. SEED and
    `name` seed the draws, which do not depend on the other scores.
    """
    pairs = np.stack([after.parts - before.parts, before.sizes], 1)
    outcomes_K2, counts_K = np.unique(pairs, axis=0, return_counts=True)
    random = np.random.default_rng([SEED, *name.encode()])
    rows = max(1, CHUNK // len(outcomes_K2))
    parts = []
    for start in range(0, DRAWS, rows):
        drawn_RK = random.multinomial(len(pairs), counts_K / len(pairs), size=min(rows, DRAWS - start))
        sums_R2 = drawn_RK @ outcomes_K2
        parts.append(sums_R2[:, 0] / sums_R2[:, 1])
    return np.concatenate(parts)


def interval(draws: NDArray[np.float64], items: int, differing: int) -> Interval:
    """The percentile interval of resampled differences: the middle 95 %."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(float(low), float(high), items, differing)


NOISE = 2.0  # standard errors; chance exceeds them in 1 of 20 differences


class Figure(NamedTuple):
    """A score, its standard error, and the number of items behind it where that is known."""

    value: float
    stderr: float
    items: int | None = None


def score_interval(name: str, figure: Figure) -> tuple[float, float]:
    """The 95 % interval of a score by its standard error; a share stays between 0 and 1."""
    low, high = figure.value - CONFIDENCE * figure.stderr, figure.value + CONFIDENCE * figure.stderr
    return (low, high) if name.startswith("bits_per_byte") else (max(0.0, low), min(1.0, high))


def mean_figure(figures: Sequence[Figure]) -> Figure:
    """The mean of independent scores, and the standard error of the mean."""
    stderr = math.sqrt(sum(figure.stderr**2 for figure in figures)) / len(figures)
    return Figure(sum(figure.value for figure in figures) / len(figures), stderr)


class Change(NamedTuple):
    """One score in two results of the same suite."""

    name: str
    before: Figure
    after: Figure
    paired: Interval | None = None  # where the scores of the same items are known for both

    @property
    def difference(self) -> float:
        """The score after, less the score before."""
        return self.after.value - self.before.value

    @property
    def noise(self) -> float:
        """The largest difference by chance between independent results; between paired results it is smaller."""
        return NOISE * math.hypot(self.before.stderr, self.after.stderr)

    @property
    def beyond_noise(self) -> bool:
        """Whether the models differ beyond chance: by the paired interval where there is one."""
        if self.paired is not None:
            return self.paired.beyond_noise
        if any(figure.items is not None and figure.items < LEAST for figure in (self.before, self.after)):
            return False
        return abs(self.difference) > self.noise

    @property
    def fell(self) -> bool:
        """Whether the later model is worse; more bits per byte are worse."""
        return self.beyond_noise and (self.difference > 0) == self.name.startswith("bits_per_byte")

    @property
    def verdict(self) -> str:
        """The verdict on the later model."""
        return "within noise" if not self.beyond_noise else "worse" if self.fell else "better"


def figures(scores: Mapping[str, Any]) -> dict[str, Figure]:
    """The scores that compare across models, each with its standard error.

    These are `acc.<task>`, `bits_per_byte.<source>`, `in_template` (share of the prompts), `followed_content`,
    `followed_form` and `followed`.
    """
    found = {
        f"acc.{label}": _share(task["acc"], task["items"], task["stderr"]) for label, task in scores["tasks"].items()
    }
    for label, text in scores["text"].items():
        count = text.get("documents", text.get("windows"))
        found[f"bits_per_byte.{label}"] = Figure(text["bits_per_byte"], text["stderr"], count)
    if "chat" in scores:
        count = scores["chat"]["prompts"]
        share = scores["chat"]["answered_in_template"] / count
        found["in_template"] = _share(share, count)
    for name in PARTS:
        if followed := scores.get("instructions", {}).get(name):
            found[name] = _share(followed["share"], followed["items"], followed["stderr"])
    return found


def _share(share: float, items: int, stderr: float = 0.0) -> Figure:
    """A share with its error; a greater one is kept, as where the items are not independent."""
    return Figure(share, max(stderr, share_error(share, items)), items)


def changes(before: Mapping[str, Figure], after: Mapping[str, Figure]) -> list[Change]:
    """Each score that both results have."""
    return [Change(name, before[name], figure) for name, figure in after.items() if name in before]
