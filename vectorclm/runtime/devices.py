"""Where and how a stage runs: devices, threads, micro-batches. Never part of a fingerprint."""

import ctypes
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field

from vectorclm.errors import ConfigError, OutOfMemoryError
from vectorclm.runtime.distributed import ALONE, Group
from vectorclm.settings import Settings

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


class Runtime(Settings):
    """Settings of the machine, not of the result."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where torch runs; auto takes a GPU if there is one"
    )
    processes: int = Field(
        0, ge=0, description="Processes that train together, by torchrun; 0 = one for each GPU, without a GPU one"
    )
    threads: int = Field(0, ge=0, description="CPU threads of torch in each process; 0 = as many as cores for all")
    micro_batch_size: int = Field(
        0, ge=0, description="Windows in one forward pass; 0 = chosen from the sequence length"
    )
    loader_workers: int = Field(
        0, ge=0, description="Processes that read batches ahead; 0 = read in the training process"
    )
    checkpoint_interval: int = Field(
        0, ge=0, description="Steps between checkpoints; 0 = a twentieth of the run, but 25 to 1,000 steps"
    )
    keep_checkpoints: bool = Field(
        False,
        description="Keep every checkpoint, also of a finished training, for `vectorclm evaluate --every-checkpoint`; "
        "`vectorclm store gc` removes them",
    )
    deterministic: bool = Field(
        False,
        description="On a GPU, only kernels that add in one order, for a sixth to a quarter more time; without it, the "
        "same training twice, or killed and resumed, differs by rounding there. A CPU always gives the same bytes",
    )
    parallel_stages: int = Field(0, ge=0, description="Stages that may run side by side; 0 = one for each two cores")
    placement: Literal["inline", "pools"] = Field(
        "inline",
        description="Where the stages of a curriculum run: inline, on its own machine; pools, each as a run of its own "
        "on a worker of the pool cpu or gpu",
    )
    allow_unsandboxed: bool = Field(
        False,
        description="Run the programs that a model writes also where the system offers no sandbox: there they can do "
        "all that you can, and cheat the tests",
    )
    retries: int = Field(2, ge=0, description="How often a stage is retried after a fault that a retry can mend")
    block_cache: str | None = Field(
        None,
        description="Local folder that keeps the blocks of tokens that a training reads from a remote store, verified "
        "whenever they are read; default: none, they are held in memory only",
    )
    work_dir: str | None = Field(
        None,
        description="Local folder for work in progress; default: beside a local store, else the cache folder",
    )

    def check(self, group: Group = ALONE) -> None:
        """Raise ConfigError where this machine cannot do what is asked of it."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is cuda, but torch sees no GPU here: use auto or cpu, or install a CUDA build")
        processes, gpus = max(self.processes, group.local_world_size), torch.cuda.device_count()
        if processes > 1 and self.torch_device().type == "cuda" and processes > gpus:
            raise ConfigError(f"{processes} processes need a GPU each, but torch sees {gpus}: lower processes")
        if self.work_dir is not None:
            try:
                Path(self.work_dir).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"work_dir {self.work_dir} cannot be made: {error.strerror}") from error

    def torch_device(self) -> torch.device:
        """The device this runtime names."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    def training_processes(self) -> int:
        """How many processes train together on this machine."""
        return self.processes or (torch.cuda.device_count() if self.torch_device().type == "cuda" else 1)

    def threads_each(self, processes: int) -> int:
        """CPU threads of each of so many processes."""
        return self.threads or max(1, (os.cpu_count() or 1) // processes)

    def windows_at_once(self, window_tokens: int, device: torch.device) -> int:
        """Windows in one forward pass: as set, or as many as suit the device, a GPU of 64 GB or more twice as many."""
        tokens = 2**12
        if device.type == "cuda":
            tokens = 2**17 if torch.cuda.get_device_properties(device).total_memory > 60e9 else 2**16
        return self.micro_batch_size or max(1, tokens // window_tokens)

    def configure_torch(self, group: Group = ALONE) -> torch.device:
        """Set threads and precision for this process and return the device, on GPUs the one of its local rank."""
        _keep_memory()
        torch.set_num_threads(self.threads_each(group.local_world_size))
        torch.set_float32_matmul_precision("high")
        device = self.torch_device()
        if device.type == "cuda" and self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, torch's flag forbids products
            torch.use_deterministic_algorithms(True)
        if device.type == "cuda" and group.world_size > 1:
            device = torch.device("cuda", group.local_rank)
            torch.cuda.set_device(device)
        return device


def _keep_memory() -> None:
    """Have glibc keep what is freed: every step asks for the same again, and new pages cost a training step 5 %."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def memory_explained(micro_batch_size: int) -> Iterator[None]:
    """Say what to do where the block runs out of memory. Raises OutOfMemoryError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch says it as RuntimeError, on GPUs as a subclass of it
        said = str(error)
        on_cpu, on_gpu = "DefaultCPUAllocator: can't allocate memory" in said, "out of memory" in said
        if not (on_cpu or on_gpu or isinstance(error, MemoryError | torch.OutOfMemoryError)):
            raise
        now = f"it is {micro_batch_size}" if micro_batch_size else "it is chosen from the sequence length"
        what = said.partition("\n")[0].rpartition("] ")[2] or "the system gave none"
        raise OutOfMemoryError(
            f"out of memory ({what}): lower micro_batch_size ({now}), or take a smaller model"
        ) from error


def environment() -> dict[str, Any]:
    """What byte identity depends on besides the settings: versions, hardware, git revision."""
    packages = ("torch", "tokenizers", "datasets", "pyarrow", "numpy", "safetensors")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "world_size": dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1,
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),  # which matters on GPUs alone
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
