"""Where and how a stage runs: devices, threads, micro-batches. Never part of a fingerprint."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from vectorclm.settings import Settings


class Runtime(Settings):
    """Settings of the machine, not of the result."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where torch runs; auto takes a GPU if there is one"
    )
    threads: int = Field(0, ge=0, description="CPU threads of torch; 0 = as many as cores")
    micro_batch_size: int = Field(
        0, ge=0, description="Windows in one forward pass; 0 = chosen from the sequence length"
    )
    loader_workers: int = Field(
        0, ge=0, description="Processes that read batches ahead; 0 = read in the training process"
    )
    checkpoint_interval: int = Field(
        0, ge=0, description="Steps between checkpoints; 0 = a twentieth of the run, but 25 to 1,000 steps"
    )
    parallel_stages: int = Field(0, ge=0, description="Stages that may run side by side; 0 = one for each two cores")
    retries: int = Field(2, ge=0, description="How often a stage is retried after a fault that a retry can mend")
    work_dir: str | None = Field(
        None,
        description="Local folder for work in progress; default: beside a local store, else the cache folder",
    )

    def torch_device(self) -> torch.device:
        """The device this runtime names."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    def configure_torch(self) -> torch.device:
        """Set threads and precision for this process and return the device."""
        torch.set_num_threads(self.threads or os.cpu_count() or 1)
        torch.set_float32_matmul_precision("high")
        return self.torch_device()


def environment() -> dict[str, Any]:
    """What byte identity depends on besides the settings: versions, hardware, git revision."""
    packages = ("torch", "tokenizers", "datasets", "pyarrow", "numpy", "safetensors")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "git": git_revision(),
    }


def git_revision() -> str | None:
    """The commit this package runs from, `-dirty` where the tree differs; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
