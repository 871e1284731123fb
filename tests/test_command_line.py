"""The command lines: the help of every command, found from the applications themselves, and what is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import pytest
from cyclopts import App

from flows import cli
from tests.training.test_checkpoint import write_experiment
from vectorclm import __main__ as core
from vectorclm.command_line import run
from vectorclm.config import load_experiment
from vectorclm.errors import ConfigError
from vectorclm.lineage.pinning import pin
from vectorclm.runtime.devices import Runtime
from vectorclm.stages import run_stage
from vectorclm.store.artifact import Store

FRONT_ENDS: dict[str, tuple[Callable[[Sequence[str]], int], App]] = {
    "vectorclm": (cli.main, cli.app),
    "python -m vectorclm": (core.main, core.app),
}


def below(app: App) -> list[str]:
    return [name for name in app if not name.startswith("-")]


def commands(app: App, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of a front end's commands and sub-commands, itself first."""
    yield path
    for name in below(app):
        yield from commands(app[name], (*path, name))


def app_of(app: App, path: Sequence[str]) -> App:
    for name in path:
        app = app[name]
    return app


ALL = [(front, path) for front, (_, app) in FRONT_ENDS.items() for path in commands(app)]


def test_the_commands_are_found() -> None:
    assert {("vectorclm", ()), ("vectorclm", ("up",)), ("vectorclm", ("store", "gc"))} < set(ALL)
    assert ("python -m vectorclm", ("evaluate",)) in ALL and len(ALL) > 35


@pytest.mark.parametrize(("front", "path"), ALL, ids=[" ".join([front, *path]) for front, path in ALL])
def test_help_is_printed(front: str, path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    main, app = FRONT_ENDS[front]
    assert main([*path, "--help"]) == 0
    shown = capsys.readouterr()
    assert shown.err == "" and shown.out.startswith(f"Usage: {' '.join([front, *path])} ")
    inside = app_of(app, path)
    assert [name for name in below(inside) if f"│ {name} " not in shown.out] == []
    if not below(inside):
        assert inside.default_command is not None
        about = (inside.default_command.__doc__ or "").strip().splitlines()  # a narrow terminal wraps each line
        assert [line for line in about if line.strip() and not line.endswith(".")] == []
        assert f"vectorclm {' '.join(path)}" in shown.out.partition("Example: ")[2]


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "flows.cli", "--help"],
        ["-m", "vectorclm", "--help"],
        ["-m", "flows.cli", "compare", "--help"],
    ],
    ids=" ".join,
)
def test_help_of_a_process(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "two models on the same items: differences" in " ".join(done.stdout.split())


# What takes a tenth of a second to seconds to import, and no help needs.
HEAVY = {"torch", "prefect", "mlflow", "pandas", "transformers", "datasets", "httpx", "pyarrow", "numpy"}
HELP_OF_EACH = """
import contextlib, importlib, io, json, sys
module, program, paths = json.loads(sys.argv[1])
main = importlib.import_module(module).main
for path in paths:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main([*path, "--help"]) == 0
    assert said.getvalue().startswith(f"Usage: {' '.join([program, *path])} "), path
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@pytest.mark.parametrize(
    ("module", "front"), [("flows.cli", "vectorclm"), ("vectorclm.__main__", "python -m vectorclm")]
)
def test_no_help_imports_what_takes_long(module: str, front: str) -> None:
    """One process prints the help of every command, so its modules are those of all commands."""
    task = json.dumps([module, front, [path for program, path in ALL if program == front]])
    command = [sys.executable, "-c", HELP_OF_EACH, task]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert HEAVY & set(json.loads(done.stdout)) == set()


def imported(*command: str | Path, **variables: str) -> tuple[str, set[str]]:
    """What a program prints, and the packages that it imports, which Python lists on standard error."""
    environment = {**os.environ, **variables, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    names = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    return done.stdout, {name.partition(".")[0] for name in names}


def test_the_help_of_the_installed_program_imports_nothing_that_takes_long() -> None:
    shown, modules = imported(Path(sys.executable).with_name("vectorclm"), "--help")
    assert shown.startswith("Usage: vectorclm ") and {"flows", "cyclopts"} < modules and HEAVY & modules == set()


def test_a_finished_stage_and_a_store_need_no_torch(tmp_path: Path) -> None:
    file, store = write_experiment(tmp_path), tmp_path / "store"
    experiment, _ = pin(load_experiment(str(file))[0], file, None, resolve=False)
    built, _ = run_stage("sample", experiment, Store(str(store)), Runtime(), None)
    alone = (sys.executable, "-m", "vectorclm")
    for command, said in (
        ((*alone, "sample", str(file)), f"sample reused: {built.uri}"),
        ((*alone, "store", "ls"), built.fingerprint[:12]),
        ((sys.executable, "-m", "flows.cli", "lineage", built.uri), built.fingerprint[:12]),
    ):
        shown, modules = imported(*command, VECTORCLM_STORE=str(store))
        assert said in shown and HEAVY & modules == set(), command


@pytest.mark.parametrize("front", FRONT_ENDS)
def test_the_version_is_the_installed_one(front: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert FRONT_ENDS[front][0](["--version"]) == 0
    assert capsys.readouterr().out == f"vectorclm {version('vectorclm')}\n"


def test_the_installed_program_is_the_same() -> None:
    program = Path(sys.executable).with_name("vectorclm")
    done = subprocess.run([program, "store", "gc", "--help"], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: vectorclm store gc ")


COMPLETE = """
source "$HOME/.bashrc"
for line in "vectorclm sto" "vectorclm store g" "vectorclm store gc --ol"; do
    COMP_WORDS=($line) COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMP_LINE=$line COMP_POINT=${#line}
    _vectorclm vectorclm "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"
    echo "${COMPREPLY[@]}"
done
complete -p vectorclm
"""


def test_bash_completes_commands_and_options(tmp_path: Path) -> None:
    program = str(Path(sys.executable).with_name("vectorclm"))
    environment = {**os.environ, "HOME": str(tmp_path), "SHELL": "/bin/bash"}
    environment.pop("XDG_DATA_HOME", None)
    subprocess.run([program, "--install-completion"], env=environment, capture_output=True, timeout=120, check=True)
    shell = ["bash", "--norc", "-c", COMPLETE]
    done = subprocess.run(shell, env=environment, capture_output=True, text=True, timeout=120, check=True)
    *found, registered = done.stdout.splitlines()
    assert found == ["store", "gc", "--older-than"] and registered.endswith(" vectorclm")


OPTIONS = [
    (front, path, name)
    for front, path in ALL
    if not below(app_of(FRONT_ENDS[front][1], path)) and path
    for argument in app_of(FRONT_ENDS[front][1], path).assemble_argument_collection()
    for name in argument.names
    if name.startswith("--")
]


@pytest.mark.parametrize(("front", "path"), sorted({(front, path) for front, path, _ in OPTIONS}))
def test_the_beginning_of_an_option_is_not_the_option(
    front: str, path: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    known = [name for other, command, name in OPTIONS if (other, command) == (front, path)]
    for short in {name[:-1] for name in known} - set(known) - {"-"}:
        assert FRONT_ENDS[front][0]([*path, "x", short, "1"]) == 2
        assert "Traceback" not in (said := capsys.readouterr().err) and said.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "tiny"], "vectorclm stage pretrain tiny"),
        (["run", "--threads", "many"], "--threads many: Input should be a valid integer"),
        (["evaluate", "M", "--suite", "standard", "--items", "-3"], "--items -3: Input should be greater than or"),
        (["evaluate", "M", "--items", "3"], "--items need --suite NAME"),
        (["evaluate", "M", "--text", "f", "--set", "a=1"], "--set changes an experiment, and M is a model here"),
        (["evalute", "M"], 'error: Unknown command "evalute". Did you mean "evaluate"? --help lists commands'),
        (["xyz"], 'error: Unknown command "xyz"; --help lists commands and options'),
        (["store", "lss"], 'Did you mean "ls"'),
        (["bench", "generat"], 'Did you mean "generate"'),
        (["stage", "pretrian", "tiny"], 'Did you mean "pretrain"'),
        (["run", "--stor", "x"], "Did you mean --store"),
        (["retry", "x", "--from", "nowhere"], 'Invalid value "nowhere" for --from'),
        (["chat", "--store", "/nowhere"], "there is no store at /nowhere: name one with --store"),
        (["chat", "M", "--temperature", "-1"], "--temperature -1: Input should be greater than or equal to 0"),
        (["chat", "M", "--stop", ""], "--stop must not be empty"),
        (["chat", "M", "--max-new-tokens", "0"], "--max-new-tokens must be 1 or more"),
        (["export", "M", "--type", "f16"], "--type and --out need --format gguf"),
        (["bench", "quality"], "--data"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and message in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize("command", ["up", "down", "doctor", "retry", "lineage", "promote", "report", "store ls"])
def test_a_command_about_a_platform_shows_how_the_store_is_named(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command.split(), "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "[env var: VECTORCLM_STORE] [default: ./store]" in shown and "--env-file PATH" in shown


def test_a_command_about_a_store_takes_the_file_of_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An option overrides the environment, which overrides the file."""
    monkeypatch.delenv("VECTORCLM_STORE", raising=False)
    stores = {name: tmp_path / name for name in ("file", "environment", "option")}
    for store in stores.values():
        (store / "sample").mkdir(parents=True)
    file = tmp_path / "platform.env"
    file.write_text(f"VECTORCLM_STORE={stores['file']}\nPREFECT_PORT=4321\n")

    def listed(*options: object) -> str:
        with monkeypatch.context() as patch:
            patch.setattr("os.environ", dict(os.environ))
            assert cli.main(["store", "ls", "--env-file", str(file), *map(str, options)]) == 0
        return capsys.readouterr().out

    assert listed() == f"{stores['file']}: 0 artifacts, 0 B\n"
    monkeypatch.setenv("VECTORCLM_STORE", str(stores["environment"]))
    assert listed() == f"{stores['environment']}: 0 artifacts, 0 B\n"
    assert listed("--store", stores["option"]) == f"{stores['option']}: 0 artifacts, 0 B\n"
    monkeypatch.delenv("VECTORCLM_STORE")
    for command in (["lineage", "pretrain/0"], ["report", "pretrain/0"], ["promote", "pretrain/0"]):
        with monkeypatch.context() as patch:
            patch.setattr("os.environ", dict(os.environ))
            assert cli.main([*command, "--env-file", str(file)]) == 2
        assert "--env-file" not in capsys.readouterr().err


def test_a_wrong_file_of_settings_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "platform.env"
    file.write_text("VECTORCLM_STORE\n")
    assert cli.main(["store", "ls", "--env-file", str(file)]) == 2
    assert capsys.readouterr().err == f"error: {file}, line 1: write NAME=value\n"
    assert core.main(["store", "ls", "--env-file", str(file)]) == 2
    assert "only the command `vectorclm` reads" in capsys.readouterr().err


def test_an_error_moves_no_cursor_and_keeps_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise ConfigError("no \x1b[2J\x1b]0;title\x07model \x9b31mü\r🙂\nwrite its name")

    assert run(fails) == 2
    assert capsys.readouterr().err == "error: no [2J]0;titlemodel 31mü🙂\nwrite its name\n"
