"""VectorCLM's core: raw text to an evaluated, instruction-tuned small language model.

The names in `__all__` are the library's public surface. Each is imported when it is first used, because torch takes
seconds to import.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vectorclm.dataset import Batch, StreamingLanguageModelDataset, stream_shards
    from vectorclm.errors import VectorCLMError
    from vectorclm.inference.config import SamplingParams
    from vectorclm.inference.generate import answer_text, continuation, generate
    from vectorclm.inference.load import LoadedModel, load
    from vectorclm.model import Attention, CausalLM
    from vectorclm.model_config import ModelConfig

__version__ = "0.1.0"
__all__ = [
    "Attention",
    "Batch",
    "CausalLM",
    "LoadedModel",
    "ModelConfig",
    "SamplingParams",
    "StreamingLanguageModelDataset",
    "VectorCLMError",
    "answer_text",
    "continuation",
    "generate",
    "load",
    "stream_shards",
]
_MODULES = {  # of the public names
    "dataset": ("Batch", "StreamingLanguageModelDataset", "stream_shards"),
    "errors": ("VectorCLMError",),
    "inference.config": ("SamplingParams",),
    "inference.generate": ("answer_text", "continuation", "generate"),
    "inference.load": ("LoadedModel", "load"),
    "model": ("Attention", "CausalLM"),
    "model_config": ("ModelConfig",),
}

# OpenMP reads this once, when torch is loaded. By default its threads spin while they wait, and two trainings that
# share the cores then slow each other tenfold; a short spin keeps most of the speed of one. Measured with tiny on two
# cores, tokens/s: alone 14,700 by default, 11,600 so, 9,800 without; two at once 1,000, 4,600 and 7,500 each.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"vectorclm.{module}"), name)
    raise AttributeError(f"module 'vectorclm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
