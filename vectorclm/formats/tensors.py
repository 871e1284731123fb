"""Files of tensors (safetensors): the header is checked against the file before a tensor is allocated.

The format: 8 bytes with the length of the header, the header in JSON, then the bytes of the tensors without gaps
(https://huggingface.co/docs/safetensors).
"""

import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vectorclm.errors import DataError, shortened
from vectorclm.formats.files import Failure, size_of
from vectorclm.formats.json_files import parse_json
from vectorclm.formats.limits import DIMENSIONS, TENSOR_HEADER, TENSOR_VALUES, TENSORS

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
WIDTHS = {**FLOATS, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}  # bytes of an entry
METADATA = "__metadata__"


def load_tensors(path: Path, failure: Failure = DataError, *, floats: bool = False) -> "dict[str, Tensor]":
    """The tensors of a file by name; with `floats`, all must be floating-point numbers.

    Raises `failure` for another file, and for one with more than TENSORS tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_tensors(path, failure, floats=floats)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise failure(f"{path} is not a file of tensors: {shortened(error)}") from error


def check_tensors(path: Path, failure: Failure = DataError, *, floats: bool = False) -> dict[str, tuple[int, ...]]:
    """The shapes in the header of a file of tensors, which is checked against the file's size. See `load_tensors`."""
    size = size_of(path, "a file of tensors", failure)
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise ValueError("it is too short for a header")
            (length,) = struct.unpack("<Q", start)
            if length > min(TENSOR_HEADER, size - 8):
                raise ValueError(f"its header claims {length:,} bytes, of {min(TENSOR_HEADER, size - 8):,} at most")
            header = parse_json(file.read(length), TENSOR_VALUES)
        return _shapes(header, size - 8 - length, FLOATS if floats else WIDTHS)
    except OSError as error:
        raise failure(f"{path} is not a file of tensors: {error.strerror or error}") from error
    except ValueError as error:
        raise failure(f"{path} is not a file of tensors: {error}") from error


def _shapes(header: Any, size: int, widths: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a header, whose data have `size` bytes. Raises ValueError with the reason."""
    if not isinstance(header, dict):
        raise ValueError("its header is no table")
    if len(header) > TENSORS:
        raise ValueError(f"it has {len(header):,} tensors, {TENSORS:,} at most")
    places, shapes = [], {}
    for name, entry in header.items():
        if name == METADATA:
            _check_metadata(entry)
            continue
        shapes[name], place = _entry(name, entry, widths)
        places.append((*place, name))
    end = 0
    for first, last, name in sorted(places):
        if first != end:
            raise ValueError(f"the bytes of {name!r:.100} overlap with others, or leave a gap")
        end = last
    if end != size:
        raise ValueError(f"its tensors have {end:,} bytes, and the file {size:,}: it may be cut short")
    return shapes


def _entry(name: str, entry: Any, widths: dict[str, int]) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Shape and place of one tensor."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {name!r:.100} is not dtype, shape and data_offsets")
    kind, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in widths:
        raise ValueError(f"{name!r:.100} has the type {kind!r:.20}, and the types are {', '.join(widths)}")
    if not _are_counts(shape) or len(shape) > DIMENSIONS:
        raise ValueError(f"{name!r:.100} has no shape of at most {DIMENSIONS} dimensions")
    if not _are_counts(place) or len(place) != 2 or place[0] > place[1]:
        raise ValueError(f"{name!r:.100} has no place in the file")
    if math.prod(shape) * widths[kind] != place[1] - place[0]:
        raise ValueError(f"{name!r:.100} has the shape {shape}, which does not fit its {place[1] - place[0]:,} bytes")
    return tuple(shape), (place[0], place[1])


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_metadata(entry: Any) -> None:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise ValueError(f"{METADATA} holds other values than texts")
