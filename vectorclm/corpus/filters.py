"""Row filters such as `int_score >= 3 and token_count < 8000`, translated from Python syntax to Arrow expressions.

Python's parser reads a filter, but nothing is evaluated as Python code. Arrow is imported where rows are read, because
most commands read an experiment's sources without their rows.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

OPERATORS: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.And: operator.and_,
    ast.Or: operator.or_,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
GRAMMAR = "columns, numbers, 'texts', True, False, == != < <= > >=, + - * /, in [..], is None, and, or, not"
ROW = "row of the filtered table"  # name of the added column of row indices


class Filter:
    """A condition on the columns of a row. A comparison with a null column is false.

    `columns` are the columns that the filter reads; `metadata.score` is the field `score` of the column `metadata`.
    Raises ValueError, which quotes the offending part, for an invalid filter.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.columns: list[str] = []
        try:
            tree = ast.parse(text.strip(), mode="eval")
            self.expression = self._read(tree.body)
        except SyntaxError as error:
            raise ValueError(f"not a filter: {error.msg} at character {error.offset} of {text!r}") from error
        except (RecursionError, MemoryError) as error:
            raise ValueError("not a filter: nested too deeply") from error
        if not self.columns:
            raise ValueError(f"{text!r} names no column")

    def holds(self, table: "pa.Table") -> list[int]:
        """Indices of the rows that pass the filter. Raises pa.ArrowException where a column's type does not fit."""
        import pyarrow as pa

        numbered = table.append_column(ROW, pa.array(range(len(table)), pa.int64()))
        found: list[int] = numbered.filter(self.expression)[ROW].to_pylist()
        return found

    def _read(self, node: ast.AST) -> Any:
        import pyarrow.compute as pc

        match node:
            case ast.Constant(value=bool() | int() | float() | str() as value):
                return pc.scalar(value)
            case ast.Name() | ast.Attribute():
                return self._column(node)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return ~self._read(operand)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return pc.scalar(-value)
            case ast.BoolOp(op=op, values=[first, *others]):
                found = self._read(first)
                for other in others:
                    found = OPERATORS[type(op)](found, self._read(other))
                return found
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](self._read(left), self._read(right))
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                found = None
                for place, comparison, right in zip([left, *comparators], ops, comparators, strict=False):
                    one = self._compare(place, comparison, right)
                    found = one if found is None else found & one
                return found
        raise ValueError(f"not a filter: {ast.unparse(node)!r} is not allowed; use {GRAMMAR}")

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Any:
        match op, right:
            case ast.Is(), ast.Constant(value=None):
                return self._read(left).is_null()
            case ast.IsNot(), ast.Constant(value=None):
                return self._read(left).is_valid()
            case ((ast.In() | ast.NotIn()), (ast.List(elts=members) | ast.Tuple(elts=members))) if members:
                values = [member.value for member in members if isinstance(member, ast.Constant)]
                if len(values) < len(members) or len({type(value) for value in values}) > 1:
                    raise ValueError(f"not a filter: {ast.unparse(right)!r} must be numbers or texts, of one type")
                found = self._read(left).isin(values)
                return ~found if isinstance(op, ast.NotIn) else found
        if type(op) not in OPERATORS:
            whole = ast.unparse(ast.Compare(left, [op], [right]))
            raise ValueError(f"not a filter: {whole!r} is not allowed; use {GRAMMAR}")
        return OPERATORS[type(op)](self._read(left), self._read(right))

    def _column(self, node: ast.AST) -> Any:
        import pyarrow.compute as pc

        path: list[str] = []
        while isinstance(node, ast.Attribute):
            path.insert(0, node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            raise ValueError(f"not a filter: {ast.unparse(node)!r} is not a column")
        if node.id not in self.columns:
            self.columns.append(node.id)
        return pc.field(node.id, *path)
