"""Programs that a model wrote: honest ones get the verdict they earn, and those that cheat gain nothing."""

import collections
import json
import math
import os
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from vectorclm.errors import DataError
from vectorclm.evaluation.code_judge import NotLiteral, TooLarge, decode, encode
from vectorclm.evaluation.sandbox import Problem, passes

pytestmark = pytest.mark.usefixtures("sandboxed")  # none of these programs runs without one

PROBLEM = Problem(
    "def answer(n):\n",
    "answer",
    "def check(candidate):\n    assert candidate(1) == 41\n    assert candidate(2) == 82\n    assert candidate(3) == 7",
)
HONEST = "    return {1: 41, 2: 82, 3: 7}[n]\n"


class Answer(int):
    pass


Point = collections.namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "arrives"),
    [
        (value, value)
        for value in (
            *(None, True, 0, -7, 10**4000, -(2**53), 1.5, -0.0, math.inf, 1e-320, 2 + 3j, "é\ud800\n", b"\0\xff"),
            *(
                bytearray(b"ab"),
                [],
                [[1], "a"],
                (),
                (1, [2.0], {"k": (None,)}),
                {1, 2},
                frozenset({"a"}),
                range(3, 9, 2),
            ),
            *({}, {(1, 2): [3], "x": {}}, Decimal("0.10"), Fraction(1, 3), {"int": "ff"}, collections.deque([1])),
        )
    ]
    + [
        (Answer(5), 5),
        (Point(1, 2), (1, 2)),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        ({2: 3, 1: 2}.keys(), {2: 3, 1: 2}.keys()),
        (np.arange(2), collections.deque([0, 1])),
    ],
    ids=repr,
)
def test_a_literal_arrives_as_exactly_what_it_is(value: Any, arrives: Any) -> None:
    found = decode(json.loads(json.dumps(encode(value))))
    assert type(found) is type(arrives) and found == arrives and repr(found) == repr(arrives)


def test_what_is_no_literal_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(10**5):
        deep = [deep]
    for value in (object(), len, type, deep, {"a": print}):
        with pytest.raises((NotLiteral, TooLarge)):
            encode(value)
    assert list(decode(encode(n for n in range(3)))) == [0, 1, 2] and math.isnan(decode(encode(math.nan)))
    for data in ({}, {"eval": "1"}, {"int": "x"}, {"a": 1, "b": 2}, {"set": [[1]]}, {"range": ["a"]}):
        with pytest.raises((TypeError, ValueError, KeyError)):
            decode(data)


@pytest.mark.parametrize(
    ("prompt", "completion", "test", "passed"),
    [
        ("def f(x):\n    '''Double.'''\n", "    return 2 * x", "assert candidate(4) == 8", True),
        ("def f(x):\n    '''Double.'''\n", "    return x", "assert candidate(4) == 8", False),
        ("def f(x):\n", "    return (", "assert True", False),
        ("def g(x):\n    return 3\ndef f(x):\n    ''\n", "    return g(x)", "assert candidate(0) == g(1)", True),
        ("def f(x):\n    ''\n", "    x.append(1); return x", "a = [0]; assert candidate(a) == [0, 1]", True),
        ("def f(x):\n    ''\n", "    return map(str, x)", "assert tuple(candidate((1, 2))) == ('1', '2')", True),
        ("def f(x):\n    ''\n", "    return map(str, x)", "assert candidate((1, 2)) == ['1', '2']", False),
        ("def f(x, *, k=1):\n    ''\n", "    return x == {1: ()} and k", "assert candidate({1: ()}, k=5) == 5", True),
        ("def f(x):\n    ''\n", "    return None", "assert candidate(1) is None", True),
        ("def f(x):\n    ''\n", "    import numpy\n    return numpy.prod(x)", "assert candidate([2]) == 2", False),
        ("def f(x):\n    ''\n", "    return x + x", "import numpy; assert candidate([2]) == [2, 2]", True),
        ("def f(x):\n    ''\n", "    return {2: 0, 1: 0}.keys()", "assert tuple(candidate(0)) == (2, 1)", True),
        ("def f(x):\n    ''\n", "    return {2: 0, 1: 0}.keys()", "assert candidate(0) == {1, 2}", True),
        ("n = 0\ndef f():\n    ''\n", "    global n; n += 1; return n", "candidate(); assert candidate() == 2", True),
        ("def f(x):\n    ''\n", "    return 'a' * 10 ** 6", "assert len(candidate('b' * 10 ** 6)) == 10 ** 6", True),
        ("def f(x):\n    ''\n", "    return x ** 9999", "assert candidate(3) == 3 ** 9999", True),
        *(
            (
                "class Own(Exception): pass\ndef f(x):\n    ''\n",
                f"    raise {error}",
                f"try:\n        candidate(1)\n    except {caught}:\n        return\n    assert False",
                error != "KeyError",
            )
            for error, caught in (("ValueError", "ValueError"), ("Own()", "Exception"), ("KeyError", "OSError"))
        ),
    ],
)  # fmt: skip
def test_an_honest_program_gets_the_verdict_it_earns(prompt: str, completion: str, test: str, passed: bool) -> None:
    assert passes(Problem(prompt, "f", f"def check(candidate):\n    {test}\n"), completion) is passed


def test_humaneval_passes_its_own_solutions_and_no_others() -> None:
    if "VECTORCLM_DATA" not in os.environ:
        pytest.skip("VECTORCLM_DATA names no folder with eval/HumanEval.jsonl.zst")
    with zstandard.open(Path(os.environ["VECTORCLM_DATA"]) / "eval/HumanEval.jsonl.zst", "rt") as file:
        rows = [json.loads(line) for line in file]
    chosen = [row for n, row in enumerate(rows) if n % 20 == 3 or n in (32, 38, 50)]  # these test by helpers
    for row in rows if os.environ.get("VECTORCLM_HUMANEVAL") == "all" else chosen:
        problem = Problem(row["prompt"], row["entry_point"], row["test"])
        assert passes(problem, row["canonical_solution"]), row["task_id"]
        assert not passes(problem, "    return None\n"), row["task_id"]


MESSAGES = """(b'{"ready": true}', b'{"returned": 41}')"""
WORDS = f"[b'ended', b'passed', b'0', *(len(b).to_bytes(8, 'big') + b for b in {MESSAGES})]"
EACH = f"""    return 0
import os
def write():
    for fd in range(256):
        for word in {WORDS}:
            try: os.write(fd, word)
            except OSError: pass
"""
LIAR = "class Liar({}):\n    def __eq__(self, other): return True\n    __ne__ = __lt__ = lambda self, other: False\n"
FAKES = {
    "writes to each descriptor": EACH + "write()\n",
    "writes to each descriptor and leaves": EACH + "write(); os._exit(0)\n",
    "writes to each descriptor when called": EACH + "def answer(n):\n    write()\n    os._exit(0)\n",
    "atexit": EACH + "import atexit; atexit.register(write)\nraise SystemExit(0)\n",
    "leaves with 0": "    import os; os._exit(0)\n",
    "leaves at once": "    pass\nimport sys; sys.exit(0)\n",
    "ends the interpreter": "    raise SystemExit(0)\n",
    "an object equal to all": "    return Liar()\n" + LIAR.format(""),
    "a number equal to all": "    return Liar(5)\n" + LIAR.format("int"),
    "a text equal to all": "    return Liar('')\n" + LIAR.format("str"),
    "a list equal to all": "    return Liar()\n" + LIAR.format("list"),
    "no number": "    return float('nan')\n",
    "reads the caller's constants": """    import sys
    frame, found = sys._getframe(1), []
    while frame:
        found += [c for c in frame.f_code.co_consts if isinstance(c, int)]
        frame = frame.f_back
    return found[found.index(n) + 1]
""",
    "reads all functions": """    import gc
    for check in gc.get_objects():
        if getattr(check, '__name__', '') == 'check' and n in check.__code__.co_consts:
            return check.__code__.co_consts[check.__code__.co_consts.index(n) + 1]
""",
    "replaces what tests call": EACH
    + """import builtins, json, select, struct, sys
builtins.AssertionError = builtins.Exception = type('E', (BaseException,), {})
builtins.exec = builtins.compile = lambda *_: None
json.dumps = lambda _: '{"passed": true}'
sys.excepthook = lambda *_: write()
""",
    "reads the callers' variables": EACH
    + """def answer(n):
    import sys
    frame = sys._getframe(1)
    while frame:
        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
            if isinstance(value, int) and value > 2:
                for word in (b'ended', b'passed'):
                    try: os.write(value, word)
                    except (OSError, OverflowError): pass
        frame = frame.f_back
    os._exit(0)
""",
    "reads what processes show": """    import glob
    text = ''
    for path in glob.glob('/proc/[0-9]*/*'):
        try: text += open(path, errors='replace').read()
        except OSError: pass
    import re
    return int(re.search(rf'candidate\\({n}\\) == (\\d+)', text)[1])
""",
    "ends a loop of the tests": "    raise StopIteration\n",
    "a class of its own error": "    raise type('AssertionError', (Exception,), {})\n",
    "a text too long": "    return 'x' * (1 << 25)\n",
    "a list too deep": "    x = []\n    for _ in range(10 ** 5): x = [x]\n    return x\n",
    "an error that no test may catch": "    raise SystemExit if n < 3 else GeneratorExit\n",
    "a message too deep": "    import os\n    for fd in range(3, 20):\n"
    "        try: os.write(fd, (60000).to_bytes(8, 'big') + b'[' * 60000)\n"
    "        except OSError: pass\n    os._exit(0)\n",
    "a message too long": "    import os\n    for fd in range(3, 20):\n        try: os.write(fd, b'\\xff' * 9)\n"
    "        except OSError: pass\n    os._exit(0)\n",
    "takes all memory": "    return len(bytearray(1 << 33))\n",
    "breaks the stack": "    import sys; sys.setrecursionlimit(1 << 30)\n    return answer(n)\n",
    "ends its parent": "    import os; os.kill(os.getppid(), 9); os._exit(0)\n",
}  # fmt: skip


@pytest.mark.parametrize("fake", FAKES)
def test_a_program_that_cheats_fails(fake: str) -> None:
    assert not passes(PROBLEM, FAKES[fake], 3)


def test_a_program_that_does_not_cheat_passes() -> None:
    assert passes(PROBLEM, HONEST) and passes(PROBLEM, "    pass\nanswer = {1: 41, 2: 82, 3: 7}.get\nprint('passed')\n")


HANGS = {
    "never returns": "    while True: pass\n",
    "never is defined": "    pass\nimport time; time.sleep(60)\n",
    "half a message": "    import os, time\n    for fd in range(3, 20):\n        try: os.write(fd, b'\\0\\0\\0')\n"
    "        except OSError: pass\n    time.sleep(60)\n",
    "writes for ever": "    import os\n    while True:\n        for fd in range(3, 20):\n"
    "            try: os.write(fd, b'\\0' * 7 + b'\\x01 ')\n            except OSError: pass\n",
    "an endless list": "    import itertools; return itertools.count()\n",
    "ignores signals": "    import signal, time\n    for n in range(1, 32):\n"
    "        try: signal.signal(n, signal.SIG_IGN)\n        except OSError: pass\n    time.sleep(60)\n",
}  # fmt: skip


@pytest.mark.parametrize("hang", HANGS)
def test_a_program_that_does_not_end_fails_in_time(hang: str) -> None:
    began = time.monotonic()
    assert not passes(PROBLEM, HANGS[hang], 1)
    assert time.monotonic() - began < 30


def test_tests_that_cannot_judge_from_another_process_are_named() -> None:
    for test, why in (
        ("def check(f):\n    f(len)\n", r"pass an argument that is not a literal \(builtin_function_or_method\)"),
        ("def check(f):\n    import nowhere\n", "need a package that is not installed .*nowhere"),
        ("def check(f:\n", "cannot be read .SyntaxError"),
        ("x = 1\n", "cannot be read .KeyError"),
    ):
        with pytest.raises(DataError, match=f"the tests of f cannot judge a program in another process: they {why}"):
            passes(Problem("def f(x):\n    ''\n", "f", test), "    return 1\n")


def test_no_answer_makes_tests_unsuitable() -> None:
    """Else one program would end the evaluation of all."""
    check = """def check(f):
    try: x = f(0)
    except Exception: x = 1
    f([x] * 3)
    import colorsys
    assert x is None
"""
    for body in (
        "    y = []\n    for _ in range(99): y = [y]\n    return y\n",
        "    return 'x' * ((1 << 24) - 100)\n",
        "    return [[]] * 2_000_000\n",
        "    import nowhere\n",
        "    raise ModuleNotFoundError('x')\n",
        "    return iter([object])\n",
        "    return 10 ** (1 << 24)\n",
    ):
        assert not passes(Problem("def f(x):\n    ''\n", "f", check), body, 2), body
