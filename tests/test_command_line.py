"""The command lines: the help of every command, found from the parsers themselves, and options by their whole names."""

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from flows import cli
from vectorclm import __main__ as core
from vectorclm.command_line import CommandParser

FRONT_ENDS: dict[str, tuple[Callable[[Sequence[str]], int], argparse.ArgumentParser]] = {
    "vectorclm": (cli.main, cli.command_line()),
    "python -m vectorclm": (core.main, core.command_line()),
}


def commands(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of a front end's commands and sub-commands, itself first."""
    yield path
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from commands(below, (*path, name))


def parser_of(parser: argparse.ArgumentParser, path: Sequence[str]) -> argparse.ArgumentParser:
    for name in path:
        (below,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        parser = below.choices[name]
    return parser


ALL = [(front, path) for front, (_, parser) in FRONT_ENDS.items() for path in commands(parser)]


def test_the_commands_are_found() -> None:
    assert {("vectorclm", ()), ("vectorclm", ("up",)), ("vectorclm", ("store", "gc"))} < set(ALL)
    assert ("python -m vectorclm", ("evaluate",)) in ALL and len(ALL) > 35


@pytest.mark.parametrize(("front", "path"), ALL, ids=[" ".join([front, *path]) for front, path in ALL])
def test_help_is_printed(front: str, path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    main, parser = FRONT_ENDS[front]
    with pytest.raises(SystemExit) as ended:
        main([*path, "--help"])
    shown = capsys.readouterr()
    assert (ended.value.code, shown.err) == (0, "")
    assert shown.out.startswith(f"usage: {' '.join([front, *path])} ")
    assert "%%" not in shown.out and "%(" not in shown.out
    below = {path[-1] for path in commands(parser_of(parser, path)) if len(path) == 1}
    assert [name for name in below if f"\n    {name}" not in shown.out] == []


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
    assert "two models on the same items: differences, their 95 % intervals" in " ".join(done.stdout.split())


def test_the_installed_program_is_the_same() -> None:
    program = Path(sys.executable).with_name("vectorclm")
    done = subprocess.run([program, "store", "gc", "--help"], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: vectorclm store gc ")


def test_a_store_whose_address_has_a_percent_sign(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VECTORCLM_STORE", "s3://bucket/a%20store%s")
    for main, parser in ((cli.main, cli.command_line()), (core.main, core.command_line())):
        for path in commands(parser):
            with pytest.raises(SystemExit, match=r"^0$"):
                main([*path, "--help"])
    assert "s3://bucket/a%20store%s" in capsys.readouterr().out


def test_percent_signs_of_help_texts(capsys: pytest.CaptureFixture[str]) -> None:
    parser = CommandParser("program")
    parser.add_argument("--rate", default=7, help="95 % of %(default)s in %(prog)s, 100%% or %(other)s, 5%")
    parser.print_help()
    assert "95 % of 7 in program, 100% or %(other)s, 5%" in capsys.readouterr().out


LONG = [
    (front, path, option)
    for front, path in ALL
    for action in parser_of(FRONT_ENDS[front][1], path)._actions
    for option in action.option_strings
    if option.startswith("--")
]


@pytest.mark.parametrize(("front", "path", "option"), LONG, ids=[" ".join([a, *b, c]) for a, b, c in LONG])
def test_the_beginning_of_an_option_is_not_the_option(
    front: str, path: tuple[str, ...], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = FRONT_ENDS[front][1]
    if any(isinstance(action, argparse._SubParsersAction) for action in parser_of(parser, path)._actions):
        path = next(longer for longer in commands(parser) if longer[: len(path)] == path and len(longer) > len(path))
    needed = [
        str(next(iter(action.choices))) if action.choices else "x"
        for action in parser_of(parser, path)._actions
        if not action.option_strings and not isinstance(action, argparse._SubParsersAction)
    ]
    known = {name for action in parser_of(parser, path)._actions for name in action.option_strings}
    if option[:-1] in known:
        pytest.skip(f"{option[:-1]} is an option itself")
    with pytest.raises(SystemExit, match=r"^2$"):
        parser.parse_args([*path, *needed, option[:-1]])
    assert f"unrecognized arguments: {option[:-1]}" in capsys.readouterr().err
