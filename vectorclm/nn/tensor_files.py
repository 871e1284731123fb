"""Files of tensors that other users may read where the umask allows it."""

import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, with the access rights of any other new file: the library makes its files private.

    A new file takes its rights from the umask; a file that is there keeps its own.
    """
    path.touch()
    rights = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(rights)
