"""The report of a model: what the page says of a real curriculum, and who is compared with whom."""

import re
from pathlib import Path

import pytest

from flows.reports.report import report, samples_over_time, write_report
from tests.services.curricula import Recorded
from vectorclm.errors import ConfigError
from vectorclm.lineage.chain import Lineage, lineage
from vectorclm.stages import READS


@pytest.fixture(autouse=True)
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def chat(recorded: Recorded) -> Lineage:
    return lineage(recorded.handles["finetune"]["uri"], recorded.store)


@pytest.fixture(scope="module")
def page(recorded: Recorded, chat: Lineage) -> str:
    return report(chat, recorded.store, name="mini")


def test_the_page_has_every_part_of_a_curriculum(recorded: Recorded, chat: Lineage, page: str) -> None:
    assert "mini: chat model" in page and not re.search(r"(src|href)=|url\((?!#)|@import|<script", page)
    for heading in ("Benchmarks", "Pretraining", "Fine-tuning", "Data and lineage", "Costs", "Artifacts"):
        assert f">{heading}<" in page
    for name in ("loss", "bits per byte", "learning rate", "gradient norm", "tokens a second"):
        assert page.count(f'aria-label="{name}"') == len(READS)
    for name in ("benchmarks", "data mix", "conversations", "lineage"):
        assert page.count(f'aria-label="{name}"') == 1
    for stage, handle in recorded.handles.items():
        assert (f'title="{handle["fingerprint"]}"' in page) == (stage in chat.stages)
    model = chat.stages["pretrain"].artifact
    assert model is not None and f"<b>{model.summary['last_loss']:.3f}</b>" in page
    assert "Instructions: chat model against base model" in page


def test_the_page_has_every_setting_and_the_command_that_repeats_it(
    recorded: Recorded, chat: Lineage, tmp_path: Path
) -> None:
    write_report(chat.root.artifact.uri, recorded.store, None, tmp_path / "page.html")  # type: ignore[union-attr]
    page = (tmp_path / "page.html").read_text()
    assert "<h1>mini: chat model</h1>" in page and "<code>vectorclm run mini</code>" in page
    for stage in READS:
        artifact = chat.stages[stage].artifact
        assert artifact is not None
        optimizer = artifact.manifest["config"]["optimizer"]
        assert f"<code>optimizer.learning_rate</code></td><td>{optimizer['learning_rate']}</td>" in page
    assert page.count("<details") == len([node for node in chat.stages.values() if node.artifact])


def test_a_champion_is_a_column_unless_it_is_the_model_itself(recorded: Recorded, chat: Lineage, page: str) -> None:
    base = lineage(recorded.handles["pretrain"]["uri"], recorded.store)
    assert report(chat, recorded.store, chat, "mini") == page and "champion" not in page
    against = report(chat, recorded.store, base)
    assert '<th class="number">champion</th>' in against and "<h1>chat model</h1>" in against


def test_the_page_of_a_base_model_leaves_out_what_it_lacks(recorded: Recorded) -> None:
    page = report(lineage(recorded.handles["pretrain"]["uri"], recorded.store), recorded.store)
    assert ">Pretraining<" in page and "Fine-tuning" not in page and "Instructions:" not in page


def test_samples_are_shown_at_even_distances() -> None:
    lines = [{"step": step, "samples": [{"prompt": "p", "answer": f"at {step}"}]} for step in range(0, 900, 100)]
    assert samples_over_time(lines) == {"p": [(step, f"at {step}") for step in (0, 200, 400, 600, 800)]}
    assert samples_over_time(lines[:1]) == {"p": [(0, "at 0")]} and samples_over_time([]) == {}


def test_a_page_is_written_to_a_file_or_the_reason_is_named(
    recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address, out = recorded.handles["finetune"]["uri"], tmp_path / "page.html"
    write_report(address, recorded.store, recorded.handles["pretrain"]["uri"], out)
    assert capsys.readouterr().out == f"{out}\n" and "champion" in out.read_text()
    with pytest.raises(ConfigError, match="name another file with --out"):
        write_report(address, recorded.store, None, tmp_path)
