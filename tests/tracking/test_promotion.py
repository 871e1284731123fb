"""Which scores make a candidate the champion."""

import pytest

from flows.tracking.promotion import compared, decided
from vectorclm.errors import ConfigError
from vectorclm.evaluation.statistics import Change, Figure
from vectorclm.lineage.chain import Lineage, Node
from vectorclm.store.artifact import Artifact, Store


def test_what_earns_a_promotion() -> None:
    def change(name: str, before: float, after: float) -> Change:
        return Change(name, Figure(before, 0.01), Figure(after, 0.01))

    better, level, worse = change("acc.a", 0.3, 0.4), change("acc.b", 0.3, 0.31), change("acc.c", 0.4, 0.3)
    text = change("bits_per_byte.t", 1.2, 1.1)
    assert decided(["a", "bits_per_byte.t"], [better, level, text]) == (True, [])
    assert decided(["b"], [better, level]) == (False, ["acc.b is not better by more than the noise"])
    assert decided(["a"], [better, worse]) == (False, ["acc.c is worse by more than the noise"])
    with pytest.raises(ConfigError, match=r"acc\.z; there are acc\.a"):
        decided(["z"], [better])
    with pytest.raises(ConfigError, match=r"by --task; there are bits_per_byte\.t"):
        decided([], [text])


def test_without_a_champion_only_tasks_decide() -> None:
    """A suite of texts alone says nothing of a first model, even where it is the last that was measured."""

    def scores(stage: str, tasks: dict[str, object]) -> Artifact:
        text = {"t": {"bits_per_byte": 1.2, "stderr": 0.1}}
        told = {"stage": stage, "config": {"suite": stage}, "inputs": {}, "summary": {"text": text, "tasks": tasks}}
        return Artifact(Store("unused"), stage, "0" * 64, told)

    texts, own = (
        scores("measure", {}),
        scores("evaluate", {"a": {"acc": 0.9, "stderr": 0.03, "chance": 0.5, "items": 100}}),
    )
    node = Node("finetune", "0" * 64, None)
    suite, found = compared(Lineage(node, (texts, own)), None)
    assert suite == "evaluate" and [change.name for change in found] == ["acc.a"]
    with pytest.raises(ConfigError, match="there is no champion, and no multiple choice"):
        compared(Lineage(node, (texts,)), None)
