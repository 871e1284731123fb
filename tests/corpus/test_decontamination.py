"""Runs of words shared with benchmarks: found wherever they stand, and only they."""

import random
import re
from pathlib import Path

import pytest

from vectorclm.config import load_experiment
from vectorclm.corpus.decontamination import ANCHOR, GRAM, Benchmarks, contaminated, read_benchmarks
from vectorclm.corpus.sources import CorpusConfig, benchmark_sources
from vectorclm.corpus.synthetic_world import rows
from vectorclm.errors import ConfigError

LONG = "The otter swims by the lake at night, and makes twelve small boats for the children of the village."
SHORT = "Who sings in the forest when morning comes?"


def found(text: str) -> dict[int, set[str]]:
    return Benchmarks({"long": [LONG], "short": [SHORT]}).found([b"nothing", text.encode()])


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        (LONG, {"long"}),
        (f"Before. {' '.join(LONG.split()[2:15])} after", {"long"}),
        (f"Before. {' '.join(LONG.split()[2:14])} after", set()),
        (LONG.upper().replace(" ", " -- \n"), {"long"}),
        (LONG.replace(" ", " \u201c").replace("n", "n\u2014"), set()),  # words cut in two are others
        (LONG.replace(" ", "\u00a0\u2019 "), {"long"}),
        (f"Say: {SHORT} And {LONG}", {"long", "short"}),
        (SHORT.replace("comes", "came"), set()),
    ],
)
def test_a_run_is_found_whatever_stands_between_its_words(text: str, labels: set[str]) -> None:
    assert found(text) == ({1: labels} if labels else {})


def test_a_run_over_two_documents_is_none() -> None:
    words = LONG.encode().split()
    marks = Benchmarks({"long": [LONG]})
    assert marks.found([b" ".join(words[:9]), b" ".join(words[9:])]) == {}
    assert Benchmarks({}).found([LONG.encode()]) == {} == Benchmarks({"few": ["Yes."]}).found([b"Yes.", b""])


def test_the_hashes_say_what_a_comparison_of_words_says() -> None:
    rng = random.Random(1)
    words = ["a", "Bee", "c", "d\u00e9j\u00e0", "extraordinarily"]

    def text(least: int, most: int) -> str:
        return " ".join(rng.choices(words[:2], k=rng.randint(least, most)) + rng.choices(words, k=3))

    def runs(read: str, length: int) -> set[tuple[str, ...]]:
        found = re.findall(r"\w+", read.lower())
        return {tuple(found[i : i + length]) for i in range(len(found) - length + 1)}

    items = [text(2, 25) for _ in range(60)]
    documents = [text(0, 60) for _ in range(600)]
    wanted = set()
    for item in items:
        size = len(item.split())
        if size >= ANCHOR:
            length = min(size, GRAM)
            wanted |= {n for n, read in enumerate(documents) if runs(item, length) & runs(read, length)}
    assert 50 < len(wanted) < 550
    assert set(Benchmarks({"items": items}).found([read.encode() for read in documents])) == wanted


def test_tiny_has_no_text_of_its_questions() -> None:
    tiny, _ = load_experiment("tiny")
    assert tiny.world is not None
    marks = read_benchmarks(benchmark_sources(tiny.sample, tiny.evaluate.tasks), None, tiny.world)
    assert len(marks.anchors) > 100
    for name in ("stories", "lessons"):
        assert marks.found([row["text"].encode() for row in rows(tiny.world, name)]) == {}


def test_further_benchmarks_and_none(tmp_path: Path) -> None:
    (tmp_path / "quiz.jsonl").write_text('{"q": {"text": ["' + SHORT + '"]}, "id": 1}\n')
    tiny, _ = load_experiment("tiny")
    quiz = {"label": "quiz", "path": "json", "data_files": str(tmp_path / "quiz.jsonl"), "columns": ["q"]}
    values = {**tiny.sample.model_dump(), "decontaminate_with": [quiz]}
    sources = benchmark_sources(CorpusConfig.model_validate(values), tiny.evaluate.tasks)
    assert [source.label for source in sources] == ["world", "world-two-step", "quiz"]
    assert read_benchmarks(sources[2:], None, None).found([SHORT.encode()]) == {0: {"quiz"}}
    assert benchmark_sources(CorpusConfig.model_validate({**values, "decontaminate": False}), []) == []
    twice = tiny.model_dump() | {"sample": {**values, "decontaminate_with": [{**quiz, "label": "world"}]}}
    (tmp_path / "twice.json").write_text(type(tiny).model_construct(**twice).model_dump_json(warnings=False))
    with pytest.raises(ConfigError, match="two sources share a label: world"):
        load_experiment(str(tmp_path / "twice.json"))


def test_each_item_that_training_repeats_is_known() -> None:
    items = [[LONG, "no"], ["Who sings?", SHORT], ["yes", LONG.replace("twelve", "13")], []]
    read = [b"nothing", f"Say: {SHORT}".encode(), LONG.upper().encode()]
    assert contaminated(items, read).tolist() == [True, True, False, False]
    assert contaminated(items, [LONG.replace("twelve", "13").encode()]).tolist() == [False, False, True, False]
    assert contaminated(items, []).tolist() == [False] * 4
