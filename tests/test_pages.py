"""The pages say what is there: each command line is taken by its program, each number is the code's, each file exists.

What a page's snippets do is shown where their models are: in test_tiny.py, on the model of `tiny`.
"""

import argparse
import contextlib
import io
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.run
from cyclopts import App
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tests.kill_matrix
import vectorclm.__main__ as core
from flows import cli, handle
from flows.platform import provision
from vectorclm import config_reference
from vectorclm.command_line import parse
from vectorclm.config import EXPERIMENTS, ExperimentConfig, load_experiment, load_suite
from vectorclm.errors import ConfigError
from vectorclm.evaluation.statistics import DRAWS, LEAST
from vectorclm.shards.block_readers import RetryPolicy

ROOT = Path(__file__).parent.parent
FOLDERS = ("vectorclm", "flows", "infra", "docker")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *(page for name in FOLDERS for page in (ROOT / name).glob("**/*.md"))])
}
LINES = 150  # of the first page
README = PAGES["README.md"]
SOURCES = [*ROOT.glob("vectorclm/**/*.py"), *ROOT.glob("flows/**/*.py"), *ROOT.glob("docker/*")]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FOREIGN = (
    "pip ",
    "uv ",
    "docker ",
    "apt-get ",
    "ssh ",
    "install ",
    "python -c ",
    "torchrun ",
    "prefect ",
    "sbatch ",
    "ray ",
    "kubectl ",
)  # with options of their own
STANDS_FOR = {"STAGE": "finetune", "N": "2", "KEY=VALUE": "seed=1", "STAGE/PRINT": "sample/0"}  # else any text will do
FROM_LIBRARIES = ("Detected out-of-date", "database is locked")
WORDS = {2: "two", 4: "four", 6: "six", 13: "thirteen"}


class Parsed(Exception):
    """What a command line means, by the parser of the program itself."""

    def __init__(self, parser: argparse.ArgumentParser, found: argparse.Namespace) -> None:
        super().__init__()
        self.parser, self.found = parser, found


def parsed(program: Callable[..., object], arguments: Sequence[str]) -> Parsed | str:
    """How a program reads its arguments, or what it says against them; it does nothing more."""
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: Any, given: Any = None, namespace: Any = None) -> None:
        raise Parsed(parser, parse(parser, arguments, namespace))

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as told:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        try:
            program()
        except Parsed as found:
            return found
        except SystemExit:
            return told.getvalue().strip().rpartition("error: ")[2]
    raise AssertionError("the program did not read its arguments")


def misread(app: App, arguments: Sequence[str]) -> str | None:
    """What one of our command lines says against its arguments."""
    try:
        parse(app, arguments)
    except ConfigError as error:
        return str(error)
    return None


def fenced(page: str, language: str = "") -> list[str]:
    """The blocks of a page in a language; those without one are for a shell."""
    return [text for kind, text in FENCE.findall(page) if kind == language]


def commands(text: str, *, inline: bool) -> Iterator[list[str]]:
    """The words of each command in the blocks of a page, or `inline` in backticks; of `a|b` both, with all options."""
    if inline:
        lines = [" ".join(command.split()) for command in re.findall(r"`([^`]*)`", FENCE.sub("", text))]
    else:
        lines = [re.sub(r"\s#.*", "", line) for block in fenced(text) for line in block.splitlines()]
    for command in (part for line in lines for part in line.split(" && ")):
        words = re.sub(r"[\[\]']", "", command).split()
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        choices = [word.split("|") for word in words]
        for number in range(max(map(len, choices), default=0)):
            yield [STANDS_FOR.get(word[number % len(word)], word[number % len(word)]) for word in choices]


def refused(words: Sequence[str]) -> str | None:
    """What the program says against a command line, if it is one of ours."""
    match [*words]:
        case ["vectorclm", *rest] if rest:
            return misread(cli.app, rest)
        case ["python", "-m", "vectorclm", *rest]:
            return misread(core.app, rest)
        case ["python", "-m", "tests.kill_matrix", *rest]:
            found = parsed(tests.kill_matrix.main, rest)
        case ["torchrun", *rest]:
            launched = torch.distributed.run.get_args_parser().parse_args(rest)
            assert launched.module and launched.training_script == "vectorclm"
            return misread(core.app, launched.training_script_args)
        case ["make", *rest] if not any("$" in word for word in rest):
            done = subprocess.run(["make", "--dry-run", *rest], cwd=ROOT, capture_output=True, text=True, check=False)
            return done.stderr if done.returncode else None
        case ["pip", "install", *rest]:
            extras = re.findall(r'extra == "(\w+)"', " ".join(requires("vectorclm") or []))
            return None if set(re.findall(r"\[(\w+)", " ".join(rest))) <= set(extras) else f"no extra of {extras}"
        case _:
            return None
    return None if isinstance(found, Parsed) else found


def mistakes(told: Sequence[Sequence[str]], *, named: bool) -> dict[str, str]:
    """What programs say against these command lines; one that is only `named` needs no arguments."""
    found = {shlex.join(words): why for words in told if (why := refused(words))}
    incomplete = re.compile(
        "the following arguments are required|(Command .* )?(parameter )?[\\w-]+ requires an argument"
    )
    return {line: why for line, why in found.items() if not (named and incomplete.match(why))}


@pytest.mark.parametrize("page", PAGES)
def test_every_command_in_a_block_is_taken_by_its_program(page: str) -> None:
    assert mistakes(list(commands(PAGES[page], inline=False)), named=False) == {}


def test_the_pages_have_blocks_of_commands() -> None:
    """The commands that the test above has to check."""
    told = [words for page in PAGES.values() for words in commands(page, inline=False)]
    assert sum(words[:1] in (["vectorclm"], ["python"], ["torchrun"], ["make"]) for words in told) >= 50
    assert mistakes([["vectorclm", "run", "tiny", "--no-such-option"]], named=False) != {}


@pytest.mark.parametrize("page", PAGES)
def test_every_command_in_the_text_is_one(page: str) -> None:
    told = list(commands(PAGES[page], inline=True))
    assert page != "README.md" or ["vectorclm"] in [words[:1] for words in told]
    assert mistakes(told, named=True) == {}


def test_every_command_that_a_message_names_is_one() -> None:
    """In backticks, in an error or a comment; what is filled in later stands for itself."""
    told = []
    for file in SOURCES:
        text = re.sub(r'"\s*\n\s*f?"', "", file.read_text())  # a message in two lines
        told += commands(re.sub(r"\{[^{}]*\}", "X", text), inline=True)
    assert sum(words[:1] == ["vectorclm"] for words in told) > 20
    assert mistakes(told, named=True) == {}


def options(app: App) -> set[str]:
    """The options of a command line and of all its commands."""
    below = [name for name in app if not name.startswith("-")]
    if not below:
        return {name for argument in app.assemble_argument_collection() for name in argument.names}
    flags = [name for name in app if name.startswith("-")]  # --install-completion
    return {"--help", *flags, *app.version_flags}.union(*(options(app[name]) for name in below))


@pytest.mark.parametrize("page", PAGES)
def test_every_option_of_a_page_exists(page: str) -> None:
    text = "\n".join(line for line in PAGES[page].splitlines() if not line.lstrip("`").startswith(FOREIGN))
    foreign = r"`(?:build )?--(?:profile|build-arg)[^`]*`|`docker (?:compose|build)[^`]*`|`--user[^`]*`|`curl [^`]*`"
    text = re.sub(foreign, "", text)
    known = {"--limit"}  # of a worker of Prefect
    known |= {"--signal", "--requeue"}  # of Slurm, in train.sbatch
    known |= {"--format", "--file", "--command", "--no-owner", "--dbname"}  # of Postgres, run by test_backup
    matrix = parsed(tests.kill_matrix.main, ["x"])
    assert isinstance(matrix, Parsed)
    known |= options(cli.app) | options(core.app) | set(matrix.parser._option_string_actions)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) - known == set()


@pytest.mark.parametrize("page", PAGES)
def test_every_file_of_a_page_exists(page: str) -> None:
    text, here = PAGES[page], (ROOT / page).parent
    links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text)
    for link in (one or other for one, other in links):
        if "://" in link:
            continue
        name, _, place = link.partition("#")
        target = here / name if name else ROOT / page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", FENCE.sub("", target.read_text()), re.MULTILINE) if place else []
        assert not place or place in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], link
    paths = re.findall(r"`((?:vectorclm|flows|infra|docker|tests|pools)/[\w./-]*)`", text)
    assert [path for path in paths if not (ROOT / path).exists() and not (here / path).exists()] == [
        "docker/platform.env"
    ] * (paths.count("docker/platform.env"))
    assert (ROOT / "docker" / "platform.env.example").is_file()


def test_every_picture_is_in_a_page_and_is_small() -> None:
    """`make pictures` takes those of the platform and of the terminal anew."""
    shown = {
        (ROOT / page).parent.joinpath(name).resolve()
        for page, text in PAGES.items()
        for name in re.findall(r"(?:\]\(|src=\")([^)\s\"]+\.(?:png|svg))", text)
    }
    pictures = {*(ROOT / "infra" / "pictures").iterdir()}
    assert pictures == shown and max(file.stat().st_size for file in pictures) < 300_000


@pytest.mark.parametrize("package", ["vectorclm", "flows"])
def test_the_map_of_a_package_names_every_module_and_no_other(package: str) -> None:
    named = set()
    for names, _, modules in re.findall(r"^\| (`[\w./`, ]+`) \| (.*) \| (.*) \|$", PAGES[f"{package}/README.md"], re.M):
        named |= {f"{package}/{name}.py" for name in re.findall(r"`(\w+)\.py`", names)}
        for folder in re.findall(r"`([\w/]+)/`", names):
            named |= {f"{package}/{folder}/{name}.py" for name in re.findall(r"`(\w+)`", modules)}
    files = (ROOT / package).glob("**/*.py")
    assert named == {path.relative_to(ROOT).as_posix() for path in files if path.name != "__init__.py"}


def test_the_first_page_is_short() -> None:
    assert README.count("\n") <= LINES


def test_the_first_page_leads_to_every_page() -> None:
    assert {page for page in PAGES if page != "README.md" and f"]({page}" not in README} == set()


def test_the_tables_of_keys_are_those_of_the_config_classes() -> None:
    """`python -m vectorclm.config_reference` writes them anew."""
    page = PAGES["vectorclm/experiments/README.md"]
    assert config_reference.updated(page) == page
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \| (.*) \| (.*) \| (.*) \|$", config_reference.reference(), re.M)
    assert (
        len(rows) > 100
        and [name for name, kind, default, *_, meaning in rows if not (kind and default and meaning)] == []
    )
    assert set(config_reference.UNITS) <= {name for name, *_ in rows}


def test_an_old_page_of_keys_is_found_and_written_anew(tmp_path: Path) -> None:
    page = PAGES["vectorclm/experiments/README.md"]
    meaning = str(ExperimentConfig.model_fields["seed"].description)
    old = tmp_path / "README.md"
    old.write_text(page.replace(meaning, "other words"), encoding="utf-8")
    assert old.read_text(encoding="utf-8") != page
    config_reference.main(old)
    assert old.read_text(encoding="utf-8") == page
    with pytest.raises(ValueError, match="lacks the line"):
        config_reference.updated("a page without marks")


def test_every_message_that_the_operators_page_explains_is_in_the_code() -> None:
    """Except those about a schema and about a lock, which are MLflow's and SQLite's own."""
    (table,) = re.findall(r"^\| message \| .*?\n\n", PAGES["infra/README.md"], re.MULTILINE | re.DOTALL)
    told = [text for row in table.splitlines() for text in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    code = re.sub(r'"\s*\n\s*f?"', "", "".join(file.read_text() for file in SOURCES))
    assert len(told) > 15 and [text for text in told if text not in code and not text.startswith(FROM_LIBRARIES)] == []


def test_the_figures_of_the_first_page_are_those_of_the_benchmarks() -> None:
    (table,) = re.findall(r"^\| what \| VectorCLM .*?\n\n", README, re.MULTILINE | re.DOTALL)
    figures = re.findall(r"\b\d+\.\d+\b", table)
    assert len(figures) > 8 and [figure for figure in figures if figure not in PAGES["BENCHMARKS.md"]] == []


def test_the_table_of_experiments_is_that_of_their_files() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| ([\d.]+)([MB]) tokens, vocabulary ([\d,]+) \|", README, re.MULTILINE)
    assert {name for name, *_ in rows} == {file.stem for file in EXPERIMENTS.glob("*.toml")}
    for name, parameters, amount, unit, vocabulary in rows:
        experiment, _ = load_experiment(name)
        assert f"{experiment.model.parameters:,}" == parameters
        assert experiment.pretrain.tokens == float(amount) * {"M": 1e6, "B": 1e9}[unit]
        assert f"{experiment.tokenizer.vocab_size:,}" == vocabulary == f"{experiment.model.vocab_size:,}"


def test_numbers_in_the_text_are_those_of_the_code() -> None:
    small, _ = load_experiment("small")
    base, _ = load_experiment("base")
    text = " ".join(" ".join(PAGES.values()).split())
    rescues = {2: "twice"}[handle.MAX_RESCUES]
    for said in (
        f"{WORDS[len(load_suite('standard')[0].tasks)]} benchmarks",
        f"`small` and `base` are evaluated by {WORDS[len(small.evaluate.tasks)]} of them",
        f"{DRAWS:,} seeded resamples",
        f"leaves out 0 and {WORDS[LEAST]} items or more differ",
        f"started again {provision.RESCUE_SECONDS} seconds after its end, {rescues} at most",
        f"A run without a heartbeat for {provision.ZOMBIE_SECONDS} seconds counts as crashed",
        f"by ranged requests, {RetryPolicy().requests} in flight",
        f"`evaluate.repetition_penalty` ({small.evaluate.repetition_penalty} in `small`)",
        f"`max_bytes` ({small.sample.sources[0].max_bytes / 1e6:.0f} MB)",
        f"{base.pretrain.tokens / 1e9}B tokens",
    ):
        assert said in text
    assert len(base.evaluate.tasks) == len(small.evaluate.tasks)


def test_python_and_torch_are_those_that_the_package_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11,<3.14" and "Python 3.11 to 3.13" in README
    (torch_range,) = (line for line in project["dependencies"] if line.startswith("torch>="))
    assert torch_range == "torch>=2.11,<2.15"


def test_every_requirement_is_locked() -> None:
    """Each of the packages that the package, its extras and theirs ask for here stands in the constraints."""
    locked = {
        canonicalize_name(line.partition("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    waiting, seen = [("vectorclm", "dev")], set[tuple[str, str]]()
    while waiting:
        seen.add(found := waiting.pop())
        for line in requires(found[0]) or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": found[1]}):
                name = canonicalize_name(needed.name)
                waiting += [(name, extra) for extra in ("", *needed.extras) if (name, extra) not in seen]
    names = {name for name, _ in seen}
    assert len(names) > 100 and names - locked - {"vectorclm"} == set()


def test_the_tests_that_a_page_chooses_are_there() -> None:
    chosen = re.findall(r'`pytest ([\w/. ]+) -k "([\w ]+)"`', PAGES["CONTRIBUTING.md"])
    assert chosen
    for files, wanted in chosen:
        names = re.findall(
            r"^def (test_\w+)", "".join((ROOT / file).read_text() for file in files.split()), re.MULTILINE
        )
        assert all(any(word in name for name in names) for word in wanted.split(" or "))
