"""Jinja expressions that compute a column of a benchmark from its other columns, within limits of time and memory.

The texts of expressions come with experiments of strangers, and the rows from data of strangers. An expression has no
loops, calls only the functions named here, and builds no value that is much longer than what it was built from.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

from jinja2 import StrictUndefined
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

EXPRESSION_LENGTH = 2_000  # characters
SIZE = 10_000_000  # characters and items that one evaluation may build
LARGEST = 10_000  # whole number as an argument of a filter
BITS = 4_096  # of a whole number
FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby", "int"),
    *("items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace"),
    *("reverse", "round", "select", "selectattr", "sort", "string", "striptags", "sum", "title", "tojson", "trim"),
    *("truncate", "unique", "upper", "wordcount"),
)
METHODS = {
    *("capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "islower"),
    *("isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip", "partition", "removeprefix"),
    *("removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines"),
    *("startswith", "strip", "swapcase", "title", "upper", "get", "items", "keys", "values"),
}


class _Environment(ImmutableSandboxedEnvironment):
    """Refuses, by SecurityError, operators and calls whose results could grow without bound."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined)
        self.filters = {name: self._limited(name, self.filters[name]) for name in FILTERS}
        self.globals = {"range": self.range, "dict": dict}
        self.left = SIZE  # characters and items that the present evaluation may still build

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute a product, power, remainder or sum."""
        sized = [value for value in (left, right) if isinstance(value, str | bytes | list | tuple)]
        if operator == "%" and sized:
            raise SecurityError("texts are not formatted by %: join them by ~")
        if operator == "*" and sized and isinstance(number := right if sized[0] is left else left, int):
            self.spend(len(sized[0]) * number)
        elif operator == "+" and len(sized) == 2:
            self.spend(len(left) + len(right))
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            _check(bits, BITS)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, *arguments: Any, **named: Any) -> Any:
        """Call a method of a text, a list or a map that METHODS names, or `range` or `dict`."""
        owner: Any = getattr(function, "__self__", None)
        name: str = getattr(function, "__name__", "")
        if function not in (self.range, dict) and not (type(owner) in (str, list, tuple, dict) and name in METHODS):
            raise SecurityError(f"{name or 'this'} cannot be called in an expression")
        if name == "join":
            return self._join(arguments[0], owner)
        if name == "replace":
            self._spend_replaced(owner, *arguments)
        return super().call(context, function, *arguments, **named)

    def range(self, *bounds: int) -> "Sequence[int]":
        """Whole numbers, as Python's range."""
        self.spend(len(found := range(*bounds)))
        return found

    def spend(self, size: int) -> None:
        """Take from what the evaluation may build. Raises SecurityError where that is more than is left."""
        _check(size, self.left)
        self.left -= max(0, size)

    def _limited(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter of Jinja that refuses large numbers as arguments, and large results."""
        passed = 1 if hasattr(function, "jinja_pass_arg") else 0  # the environment or its context comes first

        @wraps(function)
        def limited(*arguments: Any, **named: Any) -> Any:
            value, *options = arguments[passed:]
            for option in (*options, *named.values()):
                if isinstance(option, int):
                    _check(abs(option), LARGEST)
            if name == "replace":
                self._spend_replaced(str(value), *map(str, options[:2]))
            if name == "join" and "attribute" not in named and len(options) < 2:
                return self._join(map(str, value), str((*options, named.get("d", ""))[0]))
            found = function(*arguments, **named)
            if isinstance(found, str | list | tuple):
                self.spend(len(found))
            return found

        return limited

    def _join(self, parts: Iterable[Any], between: str) -> str:
        found = []
        for part in parts:
            found.append(part)
            self.spend(len(part) + len(between))
        return between.join(found)

    def _spend_replaced(self, text: str, old: str = "", new: str = "", *_: Any) -> None:
        self.spend(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def compiled(text: str) -> Callable[..., Any]:
    """A function that computes an expression from named columns.

    Raises jinja2.TemplateError for a text that is not an expression; the function raises SecurityError where the
    expression leaves its limits.
    """
    if len(text) > EXPRESSION_LENGTH:
        raise SecurityError(f"it has {len(text):,} characters, {EXPRESSION_LENGTH:,} at most")
    environment = _Environment()
    compute = environment.compile_expression(text, undefined_to_none=False)

    def computed(**columns: Any) -> Any:
        environment.left = SIZE
        return compute(**columns)

    return computed


def _check(size: int, most: int) -> None:
    if size > most:
        raise SecurityError(f"its value would have a size of more than {most:,}")
