"""Which scores make a candidate the champion, and what the registry keeps of it."""

import io
import shutil

import mlflow
import pytest
from rich.console import Console

from flows.tracking.promotion import compared, decided, promote
from flows.tracking.registry import Registry
from tests.services.curricula import Recorded, copied
from tests.test_curriculum import mini
from vectorclm.__main__ import main
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


class Promotions:
    """`promote` on a store whose registry has the chat model as the second version of the base model."""

    def __init__(self, store: Store) -> None:
        self.store, self.registry = store, Registry(store)
        mlflow.set_tracking_uri(self.registry.uri)  # by which MLflow finds the logged model of a version
        chat = self.registry.version("models:/vectorclm-chat@candidate")
        made = self.registry.client.create_model_version("vectorclm-base", chat.source or "", tags=dict(chat.tags))
        self.number = str(made.version)
        self.chat = f"models:/vectorclm-base/{self.number}"
        self.shown = ""

    def __call__(self, address: str, *tasks: str) -> int:
        console = Console(file=io.StringIO(), width=200)
        code = promote(address, tasks, self.store, console)
        assert isinstance(console.file, io.StringIO)
        self.shown = console.file.getvalue()
        return code

    @property
    def champion(self) -> str | None:
        found = self.registry.champion("vectorclm-base")
        return None if found is None else str(found.version)

    def tags(self, number: str) -> dict[str, str]:
        return dict(self.registry.version(f"models:/vectorclm-base/{number}").tags)


@pytest.fixture(scope="module")
def promotions(recorded: Recorded, tmp_path_factory: pytest.TempPathFactory) -> Promotions:
    folder = tmp_path_factory.mktemp("promotions")
    store, file = copied(recorded, folder), folder / "mini.json"
    texts = mini().model_copy(update={"chat": None, "finetune": None})  # of which both models are asked the same
    file.write_text(texts.model_dump_json())
    (folder / "runtime.json").write_text('{"threads": 1}')
    for stage in ("pretrain", "finetune"):
        options = ["--suite", str(file), "--items", "40", "--documents", "6", "--runtime", str(folder / "runtime.json")]
        address = f"{stage}/{recorded.handles[stage]['fingerprint']}"
        assert main(["evaluate", address, "--store", store.root, *options]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)  # which MLflow sets with the address of a test before
        return Promotions(store)


def test_a_first_model_must_beat_chance(promotions: Promotions) -> None:
    code = promotions("models:/vectorclm-base/1", "world")
    tags = promotions.tags("1")
    assert "vectorclm-base 1 against chance on mini" in promotions.shown
    assert (tags["promotion.over"], tags["promotion.tasks"]) == ("chance", "world")
    assert (code, tags["promotion.decision"], promotions.champion) in ((0, "promoted", "1"), (1, "refused", None))
    assert ("now @champion" if code == 0 else "not promoted; @champion stays") in promotions.shown


def test_a_successor_must_be_better_on_what_is_named_by_the_same_items(promotions: Promotions) -> None:
    promotions.registry.client.set_registered_model_alias("vectorclm-base", "champion", "1")
    assert promotions("models:/vectorclm-base/1") == 0
    assert "vectorclm-base 1 is the champion already" in promotions.shown
    assert promotions(promotions.chat, "world") == 1 and promotions.champion == "1"
    assert "acc.world is not better by more than the noise" in promotions.shown and "paired" in promotions.shown
    tags = promotions.tags(promotions.number)
    assert (tags["promotion.over"], tags["promotion.decision"]) == ("vectorclm-base 1", "refused")
    assert promotions(promotions.chat, "bits_per_byte.stories") == 0 and promotions.champion == promotions.number
    assert (
        promotions.tags(promotions.number)["promotion.decision"] == "promoted"
        and f"{promotions.number}: now @champion" in promotions.shown
    )
    with pytest.raises(ConfigError, match=r"not measured on both: acc\.nothing"):
        promotions("models:/vectorclm-base/1", "nothing")


def test_models_without_a_common_suite_are_not_compared(promotions: Promotions) -> None:
    shutil.rmtree(f"{promotions.store.root}/measure")
    promotions.registry.client.set_registered_model_alias("vectorclm-base", "champion", "1")
    with pytest.raises(ConfigError, match="no suite has measured both models with equal settings"):
        promotions(promotions.chat)
