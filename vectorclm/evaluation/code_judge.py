"""The two processes that test a program: one runs the program, the other runs the tests and writes the verdict.

Each process runs this file alone, so the file imports only the standard library. The processes share two pipes. The
tests send the arguments of each call as literals and receive a literal, so nothing that the program defines or changes
reaches the tests. Any violation of the protocol ends the tests with `failed`.
"""

import builtins
import collections
import json
import os
import select
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, NoReturn

PASSED, FAILED, UNSUITABLE = "passed", "failed", "unsuitable"
LENGTH = struct.Struct(">Q")  # of the message that follows
MOST_BYTES = 1 << 24  # of a message
MOST_LEVELS = 100  # of lists in lists
PLAIN_INT = 1 << 53  # larger integers are written in hexadecimal, which Python does not limit to 4,300 digits
MEMORY = 1 << 30


class NotLiteral(Exception):
    """A value that is not a literal."""


class TooLarge(Exception):
    """A value with too many bytes or levels."""


class ProgramError(Exception):
    """An error of a class that the program defines."""


def encode(value: Any, level: int = 0) -> Any:
    """Convert a literal to JSON; a subclass of a built-in type is converted like its base class.

    Other numbers become Python's own, other mappings `dict`, other sets the keys of a dictionary. Iterators are read to
    their end. Other collections become `deque`, which never equals a list.

    Raises NotLiteral and TooLarge.
    """
    if level > MOST_LEVELS:
        raise TooLarge(f"a value of more than {MOST_LEVELS} levels")
    if value is None or isinstance(value, bool | str | float):
        return value
    if isinstance(value, Integral):
        number = int(value)
        return number if abs(number) < PLAIN_INT else {"int": format(number, "x")}
    if isinstance(value, list):
        return _items(value, level)
    for kind in (tuple, frozenset, set):
        if isinstance(value, kind):
            return {kind.__name__: _items(value, level)}
    if isinstance(value, Mapping):
        return {"dict": [[encode(key, level + 1), encode(item, level + 1)] for key, item in value.items()]}
    return _encode_rare(value, level)


def _encode_rare(value: Any, level: int) -> Any:
    if isinstance(value, bytes | bytearray):
        return {"bytearray" if isinstance(value, bytearray) else "bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, range):
        return {"range": _items((value.start, value.stop, value.step), level)}
    if isinstance(value, Fraction):
        return {"Fraction": _items((value.numerator, value.denominator), level)}
    if isinstance(value, Decimal):
        return {"Decimal": str(value)}
    if isinstance(value, Real):
        return float(value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a scalar of NumPy
        return encode(value.item(), level + 1)
    if isinstance(value, Set):
        return {"keys": _items(value, level)}
    if isinstance(value, Iterable) and not isinstance(value, type):
        return {"iterator" if isinstance(value, Iterator) else "deque": _items(value, level)}
    raise NotLiteral(type(value).__name__)


def _items(values: Iterable[Any], level: int) -> list[Any]:
    return [encode(value, level + 1) for value in values]


def decode(data: Any, level: int = 0) -> Any:
    """Convert the output of `encode` to values of exactly the built-in types. Raises an Exception for other input."""
    if level > MOST_LEVELS:
        raise TooLarge(f"a value of more than {MOST_LEVELS} levels")
    if isinstance(data, list):
        return [decode(item, level + 1) for item in data]
    if not isinstance(data, dict):
        return data  # a type of JSON: None, bool, int, float, str
    ((kind, inside),) = data.items()
    if kind == "dict":
        return {decode(key, level + 1): decode(item, level + 1) for key, item in inside}
    if isinstance(inside, list):
        inside = decode(inside, level)
    return DECODERS[kind](inside)


DECODERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda digits: int(digits, 16),
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "keys": lambda items: dict.fromkeys(items).keys(),
    "deque": collections.deque,
    "iterator": iter,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda parts: complex(*parts),
    "range": lambda parts: range(*parts),
    "Fraction": lambda parts: Fraction(*parts),
    "Decimal": Decimal,
}


def send(pipe: int, message: Any) -> None:
    """Write the length of a message, then the message as JSON. Raises TooLarge."""
    body = json.dumps(message).encode()
    if len(body) > MOST_BYTES:
        raise TooLarge(f"a value of more than {MOST_BYTES:,} bytes")
    rest = memoryview(LENGTH.pack(len(body)) + body)
    while rest:
        rest = rest[os.write(pipe, rest) :]


def receive(pipe: int, deadline: float) -> Any:
    """Read the next message. Raises EOFError, TimeoutError after the deadline, ValueError for a bad message."""
    (size,) = LENGTH.unpack(_read(pipe, LENGTH.size, deadline))
    if size > MOST_BYTES:
        raise ValueError(f"a message of {size:,} bytes")
    return json.loads(_read(pipe, size, deadline))


def has_more(pipe: int, deadline: float) -> bool:
    """Wait until a pipe has data or is closed; False after the deadline."""
    waiting = select.poll()  # `select` fails for descriptors above 1,023
    waiting.register(pipe, select.POLLIN)
    return bool(waiting.poll(max(0.0, deadline - time.monotonic()) * 1000))


def _read(pipe: int, size: int, deadline: float) -> bytes:
    found = bytearray()
    while len(found) < size:
        if not has_more(pipe, deadline):
            raise TimeoutError
        if not (part := os.read(pipe, size - len(found))):
            raise EOFError
        found += part
    return bytes(found)


def run_program(task: Mapping[str, str], calls: int, answers: int, seconds: float) -> NoReturn:
    """Execute the program, then answer calls of its function until the process is killed."""
    deadline = time.monotonic() + seconds
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(task["program"], "program", "exec"), namespace)
    function = namespace[task["entry_point"]]
    send(answers, {"ready": True})
    while True:
        args, kwargs = decode(receive(calls, deadline))
        try:
            value = function(*args, **kwargs)
        except Exception as error:
            send(answers, {"raised": [type(error).__name__, str(error)[:1000]]})
        else:
            send(answers, {"returned": encode(value)})  # a value that is not a literal ends the process


def _compiled(prompt: str) -> Any:
    """Compile the beginning of a program; a function without a body gets an empty one."""
    try:
        return compile(prompt, "prompt", "exec")
    except SyntaxError:
        return compile(f"{prompt}\n    pass\n", "prompt", "exec")


class Tests:
    """The tests of a problem, which call a program in another process."""

    def __init__(self, task: Mapping[str, str], calls: int, answers: int, verdict: int, seconds: float) -> None:
        self.task, self.calls, self.answers, self.verdict = task, calls, answers, verdict
        self.deadline = time.monotonic() + seconds

    def run(self) -> NoReturn:
        """Execute the prompt and the tests, wait until the program has started, and test it."""
        names: dict[str, Any] = {"__name__": "__main__"}
        try:
            exec(_compiled(self.task["prompt"]), names)  # the tests may use its definitions
            names[self.task["entry_point"]] = self.call
            exec(compile(self.task["test"], "test", "exec"), names)
            check = names["check"]
        except Exception as error:
            self.end(UNSUITABLE, f"they cannot be read ({type(error).__name__}: {error})")
        self._ask(None, "ready")
        try:
            check(self.call)
        except ModuleNotFoundError as error:  # never raised by the program: see `_raise`
            self.end(UNSUITABLE, f"they need a package that is not installed ({error})")
        except BaseException:
            self.end(FAILED)
        self.end(PASSED)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call the program's function; return its value, or raise an error with the name and text of the program's."""
        try:
            call = encode([list(args), kwargs])
        except NotLiteral as error:
            self.end(UNSUITABLE, f"they pass an argument that is not a literal ({error})")
        except TooLarge:  # may be the fault of the program's answers
            self.end(FAILED)
        kind, value = self._ask(call, "returned", "raised")
        if kind == "raised":
            self._raise(*value)
        return value

    def _ask(self, call: Any, *expected: str) -> tuple[str, Any]:
        try:
            if call is not None:
                send(self.calls, call)
            ((kind, value),) = receive(self.answers, self.deadline).items()
            if kind not in expected:
                raise ValueError(f"{kind!r} is not an answer")
            return kind, decode(value)
        except BaseException:  # any error that the answer caused; `try` in a test must not catch it
            self.end(FAILED)

    def _raise(self, name: Any, text: Any) -> NoReturn:
        kind = getattr(builtins, str(name), ProgramError)
        if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(kind, ImportError):
            kind = ProgramError
        if issubclass(kind, StopIteration | StopAsyncIteration):
            self.end(FAILED)  # such an error would end a loop of the tests
        try:
            error = kind(str(text))
        except TypeError:  # a class whose constructor needs more than a text
            error = ProgramError(f"{name}: {text}")
        raise error

    def end(self, word: str, why: str = "") -> NoReturn:
        """Write the verdict and end this process."""
        os.write(self.verdict, f"{word} {why[:1000]}".strip().encode(errors="replace"))
        os._exit(0)


def limit(seconds: float) -> None:
    """Limit this process's memory, CPU time and files."""
    import resource

    limits = {"CPU": int(seconds) + 1, "AS": MEMORY, "FSIZE": 0, "NOFILE": 32, "CORE": 0, "NPROC": 64}
    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        except (AttributeError, OSError, ValueError):  # macOS lacks some limits
            continue


def main(role: str, seconds: str, *pipes: str) -> None:
    """Run as `program` or `tests`, with the task as JSON on standard input; the role `try` only sets the limits."""
    limit(float(seconds))
    if role == "try":
        return
    task = json.loads(sys.stdin.buffer.read())
    sys.stdin.close()
    if role == "tests":
        calls, answers, verdict = map(int, pipes)
        Tests(task, calls, answers, verdict, float(seconds)).run()
    calls, answers = map(int, pipes)
    run_program(task, calls, answers, float(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
