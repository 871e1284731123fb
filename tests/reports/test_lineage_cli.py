"""`vectorclm lineage`: the tree, JSON, the verification and the differences, with and without MLflow's record."""

import json
import shutil
from pathlib import Path

import pytest

from flows.reports.lineage_cli import print_lineage
from tests.services.curricula import Recorded
from vectorclm.errors import VectorCLMError
from vectorclm.store.artifact import Store


@pytest.fixture(autouse=True)
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def copy(recorded: Recorded, tmp_path: Path) -> Store:
    """The artifacts without MLflow's database."""
    shutil.copytree(recorded.store.root, tmp_path / "store", ignore=shutil.ignore_patterns("mlflow.db*"))
    return Store(str(tmp_path / "store"))


def shown(model: str, store: Store, capsys: pytest.CaptureFixture[str], **options: object) -> tuple[int, str]:
    given = {"verify": False, "diff": None, "as_json": False, **options}
    code = print_lineage(model, store, **given)  # type: ignore[arg-type]
    return code, capsys.readouterr().out


def test_the_tree_has_each_artifact_once_with_its_versions(
    recorded: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    handles = recorded.handles
    code, tree = shown(handles["finetune"]["uri"], recorded.store, capsys, verify=True)
    assert code == 0 and "verified" in tree and "vectorclm-chat 1 @candidate" in tree and "(above)" in tree
    for stage in ("sample", "tokenizer", "shards", "chat_shards", "pretrain", "finetune", "evaluate"):
        assert handles[stage]["fingerprint"][:12] in tree
    assert tree.count(" documents, ") == 1 and "source stories at sha256:" in tree
    code, tree = shown(f"{handles['export']['uri']}/base", recorded.store, capsys)
    assert code == 0 and "is a copy of" in tree and "vectorclm-base 1 @candidate" in tree


def test_a_program_reads_the_chain_and_mlflows_record(recorded: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    base = recorded.handles["pretrain"]
    code, text = shown(base["uri"], recorded.store, capsys, as_json=True, verify=True)
    found = json.loads(text)
    assert code == 0 and found["differences"] == [] and found["tree"]["fingerprint"] == base["fingerprint"]
    assert found["mlflow"]["versions"][base["fingerprint"]] == ["vectorclm-base 1 @candidate @mini"]
    assert [item["stage"] for item in found["scores"]] == ["evaluate_base"]


def test_what_differs_is_named_and_the_exit_code_says_so(
    recorded: Recorded, copy: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    model = recorded.handles["pretrain"]["uri"].replace(recorded.store.root, copy.root)
    code, tree = shown(model, copy, capsys, verify=True)
    assert code == 0 and "no MLflow: set MLFLOW_TRACKING_URI" in tree
    weights = Path(model, "model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    code, tree = shown(model, copy, capsys, verify=True)
    assert code == 1 and str(weights) in tree and "verified" not in tree
    code, text = shown(model, copy, capsys, verify=True, as_json=True)
    assert code == 1 and str(weights) in json.loads(text)["differences"][0]
    shutil.rmtree(Path(copy.root, "sample"))
    assert "gone from the store" in shown(model, copy, capsys)[1]


def test_two_models_are_compared(recorded: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    base, chat = (recorded.handles[name]["uri"] for name in ("pretrain", "finetune"))
    assert shown(chat, recorded.store, capsys, diff=chat) == (0, "the same artifacts, settings and scores\n")
    code, text = shown(chat, recorded.store, capsys, diff=base)
    assert code == 0 and "finetune  - → " in text and "scores.bits_per_byte.stories" in text
    code, text = shown(chat, recorded.store, capsys, diff=base, as_json=True)
    assert code == 0 and {"place", "before", "after"} == set(json.loads(text)[0])
    with pytest.raises(VectorCLMError, match="--diff and --verify exclude each other"):
        shown(chat, recorded.store, capsys, diff=base, verify=True)
