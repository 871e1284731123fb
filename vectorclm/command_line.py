"""Command-line base on cyclopts: shared options, parsing, exit codes, and errors in one line.

Exit codes: 0 success; 1 a check found a difference; 2 an error with a message; 75 SIGTERM ended a training after a
checkpoint; 130 Ctrl-C; 141 the reader of the output ended; 143 SIGTERM.
"""

import inspect
import json
import os
import select
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import pydantic
from cyclopts import App, Parameter
from cyclopts.exceptions import CycloptsError
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vectorclm.errors import ConfigError, VectorCLMError, disk_error

STORE = Parameter(name="--store", env_var="VECTORCLM_STORE", help="Store of the artifacts: a folder or s3://…")
StoreUri = Annotated[str, STORE]
EnvFile = Annotated[
    Path | None, Parameter(name="--env-file", help="A file of settings, as docker/platform.env.example")
]
Json = Annotated[bool, Parameter(name="--json", help="Print JSON")]
Setting = Annotated[
    tuple[str, ...],
    Parameter(name="--set", show_default=False, help="Change a setting, as in finetune.epochs=2.0; may be repeated"),
]
LOCAL_STORE = "./store"
FILE_WIDTH = 240  # columns of output that is not a terminal
MANY_ROWS = 200
GAP = "   "  # between two columns


@Parameter(name="*")
@dataclass(frozen=True)
class Place:
    """Options for the store, the mirror of the sources, and the settings of this machine."""

    store: StoreUri = LOCAL_STORE
    data: Annotated[Path | None, Parameter(help="Read every source from this local mirror")] = None
    runtime: Annotated[Path | None, Parameter(help="TOML or JSON file with settings of this machine")] = None


@Parameter(name="*")
@dataclass(frozen=True)
class StoreOptions:
    """The options that name a store, by itself or by the settings of its platform."""

    store: StoreUri = LOCAL_STORE
    env_file: EnvFile = None


def table(*headings: str) -> Table:
    """A table without a frame; a heading that ends in `>` marks a right-aligned column of numbers."""
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    for heading in headings:
        name = heading.removesuffix(" >")
        found.add_column(name, justify="right" if name != heading else "left", overflow="fold")
    return found


def print_table(found: Table) -> None:
    """Print a table to standard output; in a file or a pipe no line is wrapped."""
    console = Console() if sys.stdout.isatty() else Console(width=FILE_WIDTH)
    if found.row_count < MANY_ROWS or not _print_rows(found, console):
        console.print(found, highlight=False)


def _print_rows(found: Table, console: Console) -> bool:
    """Print a table of many rows faster than rich; False, and nothing printed, where a line must be wrapped."""
    columns = [[_plain(cell) for cell in (column.header, *column.cells)] for column in found.columns]
    widths = [max(cell_len(cell) for cell in column) for column in columns]
    if sum(widths) + len(GAP) * len(widths) > console.width:
        return False
    right = [column.justify == "right" for column in found.columns]
    for number, row in enumerate(zip(*columns, strict=True)):
        padded = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = zip(row, padded, right, strict=True)
        line = GAP.join(space + cell if at_end else cell + space for cell, space, at_end in cells).rstrip()
        if number:
            print(line)
        else:
            console.print(f"\n{line}\n{'─' * (sum(widths) + len(GAP) * (len(widths) - 1))}", style="dim", markup=False)
    print()
    return True


def _plain(cell: object) -> str:
    """The text of a cell without its markup."""
    return Text.from_markup(cell).plain if isinstance(cell, str) and "[" in cell else str(cell)


def shell_line(program: str, *arguments: str) -> str:
    """A command line for a shell; with the program's folder if it is not on the PATH."""
    beside = Path(sys.executable).with_name(program)
    where = program if shutil.which(program) or not beside.exists() else os.path.relpath(beside)
    return shlex.join([where, *arguments])


def new_app(name: str, about: str) -> App:
    """A cyclopts app whose commands return their exit code, and whose flags have no --no-… form."""
    return App(
        name=name,
        help=about,
        default_parameter=Parameter(negative=(), show_default=_shown, allow_repeating=True),
        result_action="return_value",
        help_format="plaintext",
        version=f"vectorclm {version('vectorclm')}",
        version_flags=("--version",),
    )


def _shown(default: object) -> object:
    """A default as help texts show it; None for an empty default."""
    return default if default not in (False, "", ()) or (default == 0 and default is not False) else None


Command = tuple[Callable[..., Any], inspect.BoundArguments]


def parse(
    app: App, arguments: Sequence[str] | None, read_env_file: Callable[[Path], Mapping[str, str]] | None = None
) -> Command:
    """Parse a command line into a command and its arguments. Raises ConfigError, in one line, for a wrong argument.

    The file of `StoreOptions.env_file` is read by `read_env_file` into the environment, which the options then follow.
    """
    if os.environ.get("VECTORCLM_STORE") == "":
        del os.environ["VECTORCLM_STORE"]  # an empty variable means no setting
    words = list(sys.argv[1:] if arguments is None else arguments)
    command, bound = _parse(app, words)
    files = [value.env_file for value in bound.arguments.values() if isinstance(value, StoreOptions)]
    if not files or files[0] is None:
        return command, bound
    if read_env_file is None:
        raise ConfigError("--env-file names the settings of a platform, which only the command `vectorclm` reads")
    os.environ |= read_env_file(files[0])
    return _parse(app, words)


def _parse(app: App, words: list[str]) -> Command:
    try:
        command, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        said = _explain(error)
        raise ConfigError(f"{said}{'' if said.endswith('?') else ';'} --help lists commands and options") from error
    return command, bound


def _explain(error: CycloptsError) -> str:
    cause = error.__cause__
    if not isinstance(cause, pydantic.ValidationError):
        return str(error).partition(" Available commands:")[0].strip().removesuffix(".")
    lines = []
    for item in cause.errors(include_url=False):
        option = "--" + ".".join(str(part) for part in item["loc"]).replace("_", "-")
        lines.append(f"{option} {item['input']}: {item['msg']}")
    return "; ".join(lines)


def explain(error: VectorCLMError, *, relay: bool = False) -> None:
    """Print an error to the terminal; with `relay`, as a line of JSON for the parent process."""
    if relay:
        line = json.dumps({"error": {"type": type(error).__name__, "message": str(error)}})
        print(line + "\n", end="", flush=True)  # one write, because ranks share the pipe
    else:
        print(f"error: {printable(str(error))}", file=sys.stderr)


def printable(text: str) -> str:
    """The text without control characters, which a terminal could act on."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")


def _reader_is_gone() -> bool:
    """Whether nobody reads the standard output any more; what is left to write is then dropped."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    if not watch.poll(0):  # an error is always reported
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def run(command: Callable[[], Any], *, relay: bool = False) -> int:
    """Run a parsed command and return its exit code. With `relay`, errors go to the parent process as JSON lines."""
    try:
        code = command()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has ended, such as `head`; another pipe is an error
        if not _reader_is_gone():
            raise
        return 141  # as of a program that SIGPIPE ends
    except VectorCLMError as error:
        explain(error, relay=relay)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if (found := disk_error(error)) is None:
            raise
        explain(found, relay=relay)
        return 2
    return code if isinstance(code, int) else 0
