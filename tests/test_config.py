"""Bad settings are refused before any work, with the key, its neighbours and what to do."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import following
from vectorclm.config import EXPERIMENTS, ExperimentConfig, changed, load_experiment
from vectorclm.corpus.sources import GENERATED
from vectorclm.errors import ConfigError
from vectorclm.lineage.pinning import pin
from vectorclm.stages import plans
from vectorclm.store.layout import STAGES

# The first 16 hex digits, with sources as the files name them.
FINGERPRINTS = {
    "tiny": {
        "sample": "c4c438704fa6baf7",
        "tokenizer": "605251ca2ec187b6",
        "shards": "a3bd7fe537480c40",
        "chat_shards": "e23cd16e0eb92875",
        "pretrain": "6437aa18268f605a",
        "evaluate_base": "6bdf0140c1ddcf04",
        "finetune": "a73047fe3aaa075a",
        "evaluate": "d8a5481504ae357e",
        "export": "ea3e3183e3571fa7",
    },
    "small": {
        "sample": "f1234b691d43ff5d",
        "tokenizer": "0d9dfa91d3608b76",
        "shards": "35e744003a89d720",
        "chat_shards": "5a78c6760c3dbd33",
        "pretrain": "71e260d52d0f1a35",
        "evaluate_base": "b66e1693a36a0fd9",
        "finetune": "eb260bd108ac8505",
        "evaluate": "5440d12f7f9b61c3",
        "export": "115dab246e2a829c",
    },
    "base": {
        "sample": "2c07f622bb35ff74",
        "tokenizer": "d9c12b41cc023f1b",
        "shards": "b80436c9af1feb7a",
        "chat_shards": "100123298314d762",
        "pretrain": "d3549ccd3ec429ab",
        "evaluate_base": "84d21f508935887b",
        "finetune": "26fbf79cd62c8889",
        "evaluate": "23a91602679aaee3",
        "export": "1fe01cad2b125398",
    },
}


def write(folder: Path, **changes: Any) -> str:
    """`tiny` with some sections changed, as a JSON file."""
    values = load_experiment("tiny")[0].model_dump(exclude_none=True)
    for section, change in changes.items():
        values[section] = {**values[section], **change} if isinstance(change, dict) else change
    path = folder / "experiment.json"
    path.write_text(json.dumps(values))
    return str(path)


def test_an_unknown_key_names_itself_and_its_neighbours(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(write(tmp_path, tokenizer={"vocabsize": 3}))
    message = str(caught.value)
    assert "tokenizer.vocabsize: unknown key; did you mean 'vocab_size'? (known here: vocab_size, bytes)" in message


def test_an_unknown_key_in_a_list_is_named_with_its_place(tmp_path: Path) -> None:
    phases = [{"tokens": 1000}, {"tokens": 1000, "wieghts": {}}]
    with pytest.raises(ConfigError, match=r"pretrain\.phases\.1\.wieghts: unknown key; did you mean 'weights'"):
        load_experiment(write(tmp_path, pretrain={"phases": phases}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"vocab_size": 600}}, r"model\.vocab_size \(600\) and tokenizer\.vocab_size \(512\) must be equal"),
        ({"shards": {"sequence_length": 300}}, r"shards\.sequence_length \(300\) is longer than the model's"),
        ({"chat": {"sequence_length": 300}}, r"chat\.sequence_length \(300\) is longer than the model's"),
        (
            {"pretrain": {"phases": [{"tokens": 9000, "weights": {"poems": 1}}]}},
            "phase 1 weighs poems",
        ),
        ({"model": {"num_key_value_heads": 3}}, "must be a multiple of"),
        ({"seed": -1}, "seed"),
        ({"pretrain": {"phases": [{"tokens": 10}]}}, "less than one step"),
        ({"pretrain": {"phases": [{"tokens": 9000, "weights": {"stories": 0}}]}}, "every weight of a phase is 0"),
        (
            {"pretrain": {"phases": [{"tokens": 9000, "weights": {"stories": -1, "lessons": 2}}]}},
            "greater than",
        ),
        ({"pretrain": {"phases": [{"tokens": 9000, "weights": {"stories": 4e-4, "lessons": 1}}]}}, "less than 1/1024"),
        ({"finetune": {"epochs": 0.0001}}, r"finetune\.epochs \(0\.0001\) .* set finetune\.epochs to 0\.004 at least"),
        ({"finetune": {"batch_size": 9000}}, r"finetune\.batch_size \(9000\): lower it to 5400"),
        ({"model": {"hidden_size": 130}}, r"hidden_size \(130\) must be a multiple of num_attention_heads \(4\)"),
        ({"model": {"rms_norm_eps": 1e300}}, r"model\.rms_norm_eps: .*less than or equal to 1"),
        ({"model": {"initializer_range": 2.0}}, r"model\.initializer_range: .*less than or equal to 1"),
        ({"name": "a" * 300}, "name: .*at most 64 characters"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_experiment(write(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "a" * 300}, "label: .*at most 64 characters"),
        ({"label": "manifest.json"}, r"label: an artifact has a file of this name"),
        ({"label": "prompts.jsonl"}, r"label: an artifact has a file of this name"),
        ({"weight": 1e308}, "weight: .*less than or equal to"),
        ({"weight": 1e-6}, "first has less than 1/1024 of the weight of all sources"),
    ],
)
def test_labels_and_weights_that_end_in_a_failure_later_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = {"label": "first", "path": "world", "name": "stories", "weight": 1.0}
    sources = [source | changes, source | {"label": "second", "name": "lessons"}]
    with pytest.raises(ConfigError, match=message):
        load_experiment(write(tmp_path, sample={"sources": sources}, pretrain={"phases": [{"tokens": 9000}]}))


def test_a_huge_experiment_is_named(tmp_path: Path) -> None:
    path = tmp_path / "huge.toml"
    path.write_bytes(b"#" * (16 * 2**20 + 1))
    with pytest.raises(ConfigError, match=r"huge\.toml has 16,777,217 bytes.*name files by a pattern"):
        load_experiment(str(path))


def test_every_generated_source_needs_the_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GENERATED, "planets", GENERATED["world"])
    tiny = load_experiment("tiny")[0].model_dump(mode="json")
    for tasks in tiny["evaluate"]["tasks"], tiny["sample"]["sources"], tiny["chat"]["sources"]:
        for source in tasks:
            source["path"] = "planets"
    (path := tmp_path / "planets.json").write_text(json.dumps(tiny))
    assert load_experiment(str(path))[0].world is not None
    path.write_text(json.dumps(tiny | {"world": None}))
    with pytest.raises(ConfigError, match=r"world-two-step read the generated world, but there is no \[world\]"):
        load_experiment(str(path))


def test_a_missing_experiment_and_a_broken_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no experiment 'tinny': use base, small, tiny"):
        load_experiment("tinny")
    (tmp_path / "broken.toml").write_text("name = 'a'\nname = 'b'\nseed = 1")
    with pytest.raises(ConfigError, match=r"broken\.toml: .*line 2"):
        load_experiment(str(tmp_path / "broken.toml"))


def test_the_shipped_experiments_are_what_they_state() -> None:
    shipped = {path.stem: load_experiment(path.stem)[0] for path in EXPERIMENTS.glob("*.toml")}
    assert {name: e.model.parameters for name, e in shipped.items()} == {
        "tiny": 803_968,
        "small": 8_621_312,
        "base": 50_348_544,
    }
    assert shipped["base"].pretrain.tokens == 3_500_000_000
    assert shipped["base"].shards.sequence_length == 1024
    cosmopedia = {s.name for s in shipped["base"].sample.sources if s.path == "HuggingFaceTB/cosmopedia"}
    assert len(cosmopedia) == 8


def test_a_setting_changes_the_fingerprints_of_its_stage_and_what_follows(tmp_path: Path) -> None:
    def fingerprints(**changes: Any) -> dict[str, str]:
        experiment, path = load_experiment(write(tmp_path, **changes))
        return {name: plan.fingerprint for name, plan in plans(pin(experiment, path, None, resolve=False)[0]).items()}

    before = fingerprints()
    assert tuple(before) == STAGES

    def changed(**changes: Any) -> set[str]:
        after = fingerprints(**changes)
        return {name for name in STAGES if after[name] != before[name]}

    assert changed(finetune={"epochs": 3.0}) == following("finetune") >= {"finetune", "evaluate", "export"}
    assert changed(chat={"validation_share": 0.1}) == following("chat_shards") >= {"chat_shards", "finetune"}
    assert changed(shards={"shard_bytes": 8192}) == following("shards") >= {"shards", "pretrain", "evaluate"}
    assert changed(name="other") == following("export")
    assert changed(seed=2) == set(STAGES)


def test_what_is_off_by_default_leaves_fingerprints_alone() -> None:
    """Settings that came later: an experiment without them asks for what it asked for before."""
    experiment, _ = load_experiment("small")
    off = {
        "evaluate.instructions": 0,
        "pretrain.samples": None,
        "finetune.samples": None,
        "finetune.replay": 0.0,
        "chat.tokens": 0,
        "chat.sources.0.weight": 1.0,
    }
    without = changed(experiment, off)
    for section in ("pretrain", "finetune", "chat", "evaluate"):
        dumped = getattr(without, section).model_dump()
        assert not dumped.keys() & {"samples", "replay", "tokens", "instructions"}
        assert not any("weight" in source for source in dumped.get("sources", []))
    assert ExperimentConfig.model_validate(json.loads(without.model_dump_json())) == without
    before = {name: plan.fingerprint for name, plan in plans(without).items()}
    samples = {"prompts": ["A"], "interval": 5}
    for key, value, first in (
        ("evaluate.instructions", 5, "evaluate_base"),
        ("pretrain.samples", samples, "pretrain"),
        ("finetune.samples", samples, "finetune"),
        ("finetune.replay", 0.1, "finetune"),
        ("chat.tokens", 1000, "chat_shards"),
    ):
        after = {name: plan.fingerprint for name, plan in plans(changed(without, {key: value})).items()}
        assert next(name for name in before if before[name] != after[name]) == first


def test_text_is_replayed_in_windows_as_long_as_the_conversations() -> None:
    experiment, _ = load_experiment("tiny")
    with pytest.raises(ConfigError, match=r"shards\.sequence_length \(128\) and chat\.sequence_length \(256\)"):
        changed(experiment, {"finetune.replay": 0.1})
    longer = changed(experiment, {"finetune.replay": 0.1, "shards.sequence_length": 256})
    assert set(plans(longer)["finetune"].inputs) == {"pretrain", "chat_shards", "shards"}
    with pytest.raises(ConfigError, match=r"stories need other labels in sample\.sources"):
        changed(longer, {"chat.sources.0.label": "stories"})


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_the_shipped_experiments_keep_their_fingerprints(name: str) -> None:
    """A new setting is left out at its default (`exclude_if`), so that finished artifacts are found again."""
    found = {stage: spec.fingerprint[:16] for stage, spec in plans(load_experiment(name)[0]).items()}
    moved = [stage for stage in FINGERPRINTS[name] if found.get(stage) != FINGERPRINTS[name][stage]]
    assert not moved, (
        f"{name}: other fingerprints for {', '.join(moved)}, so finished artifacts would not be found. Does a new "
        "setting lack `exclude_if` for its default? Where a stage builds other bytes from equal settings, raise its "
        "version and write the new fingerprints down here."
    )
