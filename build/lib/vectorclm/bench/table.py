"""The result table of every `bench`: a measurement, its ratio to a peer in the same run, and a bound."""

import json
import multiprocessing
import resource
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One result: our figure, the peer's, their ratio, and the bound on the ratio."""

    name: str
    ours: float | None
    peer: float | None
    ratio: float | None
    unit: str
    ask: float  # bound on the ratio
    met: bool | None  # None where it could not run
    why: str = ""  # the spread of the figures, or why it could not run


def compared(name: str, ours: Sequence[float], peer: Sequence[float], unit: str, *, ask: float, most: bool) -> Row:
    """A result with a peer: the ratio of both medians must be at most `ask` with `most`, else at least `ask`."""
    mine, theirs = median(ours), median(peer)
    ratio = mine / theirs
    spread = f"ours {min(ours):.4g} to {max(ours):.4g}, peer {min(peer):.4g} to {max(peer):.4g}, {len(ours)} rounds"
    met = ratio <= ask if most else ratio >= ask
    return Row(name, round(mine, 4), round(theirs, 4), round(ratio, 4), unit, round(ask, 4), met, spread)


def bounded(name: str, ours: Sequence[float], unit: str, bound: float, note: str = "") -> Row:
    """A result without a peer: the median must be at most `bound`; the ratio is median over bound."""
    mine = median(ours)
    ratio = mine / bound if bound else (None if mine else 0.0)
    why = f"asked: at most {bound:g}" + (f"; {note}" if note else "")
    if len(ours) > 1:
        why += f"; {min(ours):.4g} to {max(ours):.4g}, {len(ours)} rounds"
    return Row(name, round(mine, 4), None, None if ratio is None else round(ratio, 4), unit, 1.0, mine <= bound, why)


def reached(name: str, ours: Sequence[float], unit: str, bound: float, note: str = "") -> Row:
    """A result without a peer: the median must be at least `bound`; the ratio is median over bound."""
    mine = median(ours)
    why = f"asked: at least {bound:g}" + (f"; {note}" if note else "")
    why += f"; {min(ours):.4g} to {max(ours):.4g}, {len(ours)} rounds"
    return Row(name, round(mine, 4), None, round(mine / bound, 4), unit, 1.0, mine >= bound, why)


def could_not_run(name: str, unit: str, ask: float, why: str) -> Row:
    """A result that this machine cannot measure."""
    return Row(name, None, None, None, unit, ask, None, why)


def show(rows: Iterable[Row], console: Console, *, as_json: bool) -> None:
    """Print the rows: as one JSON object a line when measured, or as a table at the end."""
    table = Table("", "ours", "peer", "unit", "ratio", "asked", "met", "")
    for row in rows:
        if as_json:
            values = {key: value for key, value in asdict(row).items() if key != "why" or value}
            console.print(json.dumps(values), markup=False, highlight=False, soft_wrap=True)
            continue
        figures = ["" if value is None else f"{value:,.4g}" for value in (row.ours, row.peer)]
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        met = {True: "yes", False: "no", None: "not run"}[row.met]
        table.add_row(row.name, *figures, row.unit, ratio, f"{row.ask:.3f}", met, row.why)
    if not as_json:
        console.print(table)


Side = tuple[Callable[..., Callable[[], Any]], tuple[Any, ...]]  # the function that prepares a side, and its arguments
_ready: Callable[[], Any] | None = None  # in a child process: the function of one round


def in_turns(rounds: int, sides: Mapping[str, Side]) -> tuple[dict[str, list[Any]], dict[str, float]]:
    """Run the sides in turns; return each side's results of all rounds, and its peak memory (MB).

    Every side has its own process, which prepares once. The sides then take turns, so that a change in the machine's
    speed affects all of them.
    """
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, mp_context=context)) for name in sides}
        for name, (prepare, arguments) in sides.items():
            pools[name].submit(_prepare, prepare, arguments).result()
        returned: dict[str, list[Any]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, pool in pools.items():
                returned[name].append(pool.submit(_round).result())
        return returned, {name: pool.submit(_peak_memory).result() for name, pool in pools.items()}


def _prepare(prepare: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> None:
    global _ready
    _ready = prepare(*arguments)


def _round() -> Any:
    assert _ready is not None
    return _ready()


def _peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # Linux counts KiB
