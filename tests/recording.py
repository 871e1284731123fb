"""Record the first minutes of a user as an animated SVG: README's commands in a real terminal of 80 columns.

`python -m tests.recording` runs them in a shell, in a folder of its own, and writes infra/pictures/first-run.svg. What
takes long is shown faster. The own text is Python's reference, which each Python brings along.
"""

import os
import pty
import select
import sys
import sysconfig
import tempfile
import termios
import time
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple
from xml.sax.saxutils import escape

import pyte

ROOT = Path(__file__).parent.parent
FILE = ROOT / "infra" / "pictures" / "first-run.svg"
COLUMNS, LINES = 80, 26
PROMPT, CHAT = "$ ", "you  > "
BUSY = 3600  # seconds that a command may take on a busy machine
TYPING = 0.06  # seconds between two keys
CHANGE = 0.2  # seconds between two pictures of the terminal, at least
PICTURES = 30  # of one command, at most
PAUSE = 3.0  # seconds that the end of a command stays
QUESTION = "Quin is an owl. Where does Quin live?"
STEPS = (  # what is typed, and the text after which the next is typed: a shell's prompt, or a chat's
    ("make run", PROMPT),
    ("source .venv/bin/activate", PROMPT),
    ("vectorclm chat tiny", CHAT),
    (QUESTION, CHAT),
    ("/exit", PROMPT),
    ("ls handbook | head -3", PROMPT),
    ("vectorclm init own --text handbook/ --minutes 3", PROMPT),
    ("vectorclm run own.toml", PROMPT),
)
COLOURS = {
    "default": "#d8dee4",
    "black": "#57606a",
    "red": "#ff7b72",
    "green": "#7ee787",
    "brown": "#e3b341",
    "blue": "#79c0ff",
    "magenta": "#d2a8ff",
    "cyan": "#76e3ea",
    "white": "#f0f6fc",
}
CHARACTER, LINE = 8.4, 18  # width and height of a character's place
STYLE = (
    ".film{{animation:film {seconds:.1f}s step-end infinite}}@keyframes film{{{frames}}}"
    "text{{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre}}"
)


class Run(NamedTuple):
    """Characters of one colour in a line."""

    column: int
    text: str
    colour: str
    bold: bool


Line = tuple[Run, ...]
Shown = tuple[float, tuple[Line, ...]]  # a screen: the seconds that it stays, and its lines


@dataclass
class Terminal:
    """A shell in a pseudo-terminal, and what its screen showed over time."""

    folder: Path
    film: list[Shown] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.screen = pyte.Screen(COLUMNS, LINES)
        self.stream = pyte.ByteStream(self.screen)
        known = {name: os.environ[name] for name in ("HOME", "TMPDIR") if name in os.environ}
        known |= {"PATH": os.defpath, "PS1": PROMPT, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
        known["VIRTUAL_ENV_DISABLE_PROMPT"] = "1"
        self._shell, self._file = pty.fork()  # a session with a terminal of its own, as a person's
        if not self._shell:
            os.chdir(self.folder)
            os.execvpe("bash", ["bash", "--norc"], known)
        termios.tcsetwinsize(self._file, (LINES, COLUMNS))
        self._wait(PROMPT)

    def type(self, text: str, prompt: str) -> None:
        """Type a line, and film what it does until the prompt is there again."""
        for letter in text:
            os.write(self._file, letter.encode())
            self._read(0.3, letter)
            self.film.append((TYPING, self._lines()))
        os.write(self._file, b"\n")
        taken = self._wait(prompt)
        self.film += list(faster(taken))
        seconds, lines = self.film.pop()
        self.film.append((seconds + PAUSE, lines))

    def close(self) -> None:
        os.close(self._file)  # the shell's terminal is gone, and so it ends
        os.waitpid(self._shell, 0)

    def _wait(self, prompt: str) -> list[Shown]:
        """The screens, with the seconds that each stayed, until the cursor stands behind a prompt."""
        found: list[Shown] = []
        deadline, since = time.monotonic() + BUSY, time.monotonic()
        while time.monotonic() < deadline:
            quiet = not self._read(CHANGE)
            lines, now = self._lines(), time.monotonic()
            if not found or found[-1][1] != lines:
                found.append((now - since, lines))
                since = now
            before = self.screen.display[self.screen.cursor.y][: self.screen.cursor.x]
            if quiet and before == prompt:
                return found
        raise TimeoutError(f"no {prompt!r} within {BUSY} s:\n" + "\n".join(self.screen.display))

    def _read(self, seconds: float, until: str | None = None) -> bool:
        """Show what the shell writes within some seconds, or until it echoes a letter; whether it wrote anything."""
        end, wrote = time.monotonic() + seconds, False
        while (left := end - time.monotonic()) > 0:
            if select.select([self._file], [], [], left)[0]:
                data = os.read(self._file, 65_536)
                self.stream.feed(data)
                wrote = True
                if until is not None and until.encode() in data:
                    break
        return wrote

    def _lines(self) -> tuple[Line, ...]:
        return tuple(tuple(self._runs(number)) for number in range(LINES))

    def _runs(self, number: int) -> Iterator[Run]:
        cells = self.screen.buffer[number]
        column = 0
        while column < COLUMNS:
            first, start = cells[column], column
            while column < COLUMNS and (cells[column].fg, cells[column].bold) == (first.fg, first.bold):
                column += 1
            text = "".join(cells[place].data for place in range(start, column)).rstrip()
            if text:
                colour = first.fg if first.fg in COLOURS else f"#{first.fg}" if len(first.fg) == 6 else "default"
                yield Run(start, text, COLOURS.get(colour, colour), first.bold)


def faster(taken: list[Shown]) -> Iterator[Shown]:
    """Some of the screens of a command, evenly over its time, each for a moment; always the last."""
    step = max(1, -(-len(taken) // PICTURES))
    for number, (_, lines) in enumerate(taken):
        if number % step == 0 or number == len(taken) - 1:
            yield CHANGE, lines


def as_svg(film: list[Shown]) -> str:
    """The film as an SVG, which every browser shows: its screens below each other, of which one is seen at a time.

    A line that several screens show is written once.
    """
    width, height = round(COLUMNS * CHARACTER + 24), LINES * LINE + 24
    known: dict[Line, str] = {}
    screens, frames, now = [], [], 0.0
    whole = sum(seconds for seconds, _ in film)
    for number, (seconds, lines) in enumerate(film):
        frames.append(f"{100 * now / whole:.3f}%{{transform:translateY(-{number * height}px)}}")
        now += seconds
        uses = [
            f'<use href="#{known.setdefault(line, f"l{len(known)}")}" y="{place * LINE}"/>'
            for place, line in enumerate(lines)
            if line
        ]
        screens.append(f'<g transform="translate(0 {number * height})">{"".join(uses)}</g>')
    drawn = "".join(f'<g id="{name}">{"".join(map(_text, line))}</g>' for line, name in known.items())
    style = STYLE.format(seconds=whole, frames="".join(frames))
    inner = f'<svg x="12" y="12" width="{width - 24}" height="{height - 24}">'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<style>{style}</style><rect width="100%" height="100%" rx="8" fill="#0d1117"/><defs>{drawn}</defs>'
        f'{inner}<g class="film" fill="{COLOURS["default"]}">{"".join(screens)}</g></svg></svg>\n'
    )


def _text(run: Run) -> str:
    colour = "" if run.colour == COLOURS["default"] else f' fill="{run.colour}"'
    bold = ' font-weight="bold"' if run.bold else ""
    length = f' textLength="{len(run.text) * CHARACTER:.1f}"'
    return f'<text x="{run.column * CHARACTER:.1f}" y="14"{length}{colour}{bold}>{escape(run.text)}</text>'


def installed(folder: Path) -> None:
    """Make a folder like a clone after `make install`, with the packages of the present environment."""
    for part in ("Makefile", "pyproject.toml", "constraints.txt"):
        (folder / part).symlink_to(ROOT / part)
    venv.create(folder / ".venv", symlinks=True)
    scripts, packages = (Path(sysconfig.get_path(kind)) for kind in ("scripts", "purelib"))
    (own,) = (folder / ".venv" / "lib").glob("python*/site-packages")
    (own / "present.pth").write_text(f"import site; site.addsitedir({str(packages)!r})\n", encoding="utf-8")
    command = folder / ".venv" / "bin" / "vectorclm"
    code = (scripts / "vectorclm").read_text(encoding="utf-8").partition("\n")[2]
    command.write_text(f"#!{folder}/.venv/bin/python\n{code}", encoding="utf-8")
    command.chmod(0o755)
    (folder / ".venv" / "installed").touch()


def record(folder: Path, steps: Sequence[tuple[str, str]]) -> list[Shown]:
    """Type the lines in a shell in this folder; returns the film, in which the folder has another name."""
    terminal = Terminal(folder)
    try:
        for text, prompt in steps:
            print(text, file=sys.stderr, flush=True)
            terminal.type(text, prompt)
    finally:
        terminal.close()
    named = [
        (seconds, (tuple(_renamed(run, folder) for run in line) for line in lines)) for seconds, lines in terminal.film
    ]
    return [(seconds, tuple(lines)) for seconds, lines in named]


def _renamed(run: Run, folder: Path) -> Run:
    return run._replace(text=run.text.replace(str(folder), "~/vectorclm"))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        installed(folder)
        (folder / "handbook").mkdir()
        for topic, text in topics.items():
            (folder / "handbook" / f"{topic}.txt").write_text(text, encoding="utf-8")
        film = record(folder, STEPS)
    text = as_svg(film)
    FILE.write_text(text, encoding="utf-8")
    print(f"{FILE.relative_to(ROOT)}: {len(text):,} bytes, {sum(seconds for seconds, _ in film):.0f} s")
    for place in (str(ROOT), str(Path.home())):
        assert place not in text, f"the recording shows {place}"


if __name__ == "__main__":
    main()
