"""Strategies of hypothesis for foreign files: values, and valid files with faults in them."""

import copy
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.conftest import SEED

CASES = int(os.environ.get("VECTORCLM_FUZZ", "1500"))  # of all properties together
PROPERTIES = 34  # the shares of all together
CPU_SECONDS = 10.0  # of one case
counts: Counter[str] = Counter()  # cases that ran, by property


def fuzzed(
    strategy: st.SearchStrategy[Any], share: float = 1.0
) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """A property over a strategy: CASES / PROPERTIES cases times `share`, chosen by VECTORCLM_SEED."""

    def decorate(check: Callable[[Any], None]) -> Callable[[], None]:
        def limited(drawn: Any) -> None:
            began = time.process_time()
            counts[check.__name__] += 1
            check(drawn)
            assert time.process_time() - began < CPU_SECONDS

        limited.__name__ = limited.__qualname__ = check.__name__
        limited.__doc__ = check.__doc__
        configured = settings(
            max_examples=max(3, round(CASES / PROPERTIES * share)),
            database=None,
            deadline=None,
            phases=(Phase.explicit, Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        tested: Callable[[], None] = seed(SEED)(configured(given(strategy)(limited)))
        tested.__module__ = check.__module__
        return tested

    return decorate


DEEP: Any = 0
for _ in range(250):
    DEEP = [DEEP]

HOSTILE = st.sampled_from(
    [
        *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, 1e300, -1e-300, 1e308),
        *("", "a", "\0", "a\0b", "\ud800", "../../x", "/etc/passwd", "..", "a\\b", "x" * 5000, "é", "\U0001f642"),
        *([], {}, [[]], [None], {"": None}, {"type": "x"}, [1, "a", None], ["a"] * 300, DEEP),
    ]
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=20)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """All containers of a tree with the keys in them."""
    found = []
    waiting = [tree]
    while waiting:
        inside = waiting.pop()
        keys = list(inside) if isinstance(inside, dict) else range(len(inside)) if isinstance(inside, list) else []
        for key in keys:
            found.append((inside, key))
            if isinstance(inside[key], dict | list):
                waiting.append(inside[key])
    return found


@st.composite
def damaged_trees(draw: st.DrawFn, tree: Any) -> Any:
    """A tree of JSON with one to three values replaced, removed, repeated or renamed."""
    made = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        every = places(made)
        if not every:
            return made
        inside, key = every[draw(st.integers(0, len(every) - 1))]
        match draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "copy"])):
            case "replace":
                inside[key] = copy.deepcopy(draw(HOSTILE | VALUES))
            case "remove":
                del inside[key]
            case "rename" if isinstance(inside, dict):
                inside[draw(st.text(max_size=5) | st.sampled_from(["../../x", "a\0b", "\ud800"]))] = inside.pop(key)
            case _:
                other, place = every[draw(st.integers(0, len(every) - 1))]
                inside[key] = copy.deepcopy(other[place]) if place in other or isinstance(other, list) else None
    return made


BYTES = st.sampled_from(
    [
        b"\0",
        b"\xff" * 8,
        b"\xed\xa0\x80",
        b"[" * 400,
        b'{"a":' * 300,
        b"9" * 5000,
        b"\x7f" * 4,
        b"../../",
        b"\n",
        b'"',
        b"\\u0000",
    ]
)


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with one to four bits flipped, bytes inserted, parts removed or repeated, or the end cut off."""
    made = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(made) - 1)))
        length = draw(st.integers(1, 64))
        match draw(st.sampled_from(["flip", "flip", "insert", "overwrite", "remove", "repeat", "cut"])):
            case "flip" if made:
                made[at] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                made[at:at] = draw(BYTES)
            case "overwrite":
                made[at : at + length] = draw(st.binary(min_size=length, max_size=length))
            case "remove":
                del made[at : at + length]
            case "repeat":
                made[at:at] = made[at : at + length]
            case "cut":
                del made[at:]
    return bytes(made)
