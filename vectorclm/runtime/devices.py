"""Runtime settings of a machine (device, threads, micro-batch size), never part of a fingerprint; torch set-up.

torch takes seconds to import, and most commands need only the settings, so each function that uses torch imports it.
"""

import ctypes
import gc
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from vectorclm.errors import ConfigError, OutOfMemoryError
from vectorclm.runtime.group import ALONE, Group
from vectorclm.settings import Settings

if TYPE_CHECKING:
    import torch

LITTLE_DATA = 32_000_000  # bytes that one process prepares in seconds
MOST_WORKERS = 16  # by default: each needs memory
ActivationCheckpointing = Literal["auto", "on", "off"]
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameter numbers of mallopt in glibc's malloc.h


class Runtime(Settings):
    """Settings of the machine, which do not change the result."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Device that torch runs on; auto uses a GPU if there is one"
    )
    processes: int = Field(
        default=0,
        ge=0,
        description="Processes of a node that train together under torchrun; 0 = one for each GPU, or one on a CPU",
    )
    threads: int = Field(
        default=0, ge=0, description="CPU threads of torch in each process; 0 = the cores, divided by the processes"
    )
    micro_batch_size: int = Field(
        default=0, ge=0, description="Windows in one forward pass; 0 = chosen from the sequence length and the memory"
    )
    activation_checkpointing: ActivationCheckpointing = Field(
        default="auto",
        description="Keep only the input of each layer, and compute the layer again for its gradients: a third more "
        "time, far less memory; auto = where otherwise too few windows fit. On a CPU the bytes stay the same",
    )
    loader_workers: int = Field(
        default=0, ge=0, description="Processes that read batches ahead; 0 = read in the training process"
    )
    data_workers: int = Field(
        default=0,
        ge=0,
        description="Processes that divide a stage among themselves: sample, shards, chat_shards, and on a CPU the "
        "evaluations; 0 = one for each core, at most 16, or one for little data. The bytes stay the same",
    )
    checkpoint_interval: int = Field(
        default=0,
        ge=0,
        description="Steps between checkpoints; 0 = a twentieth of the run, at least 25 and at most 1,000 steps",
    )
    keep_checkpoints: bool = Field(
        default=False,
        description="Keep every checkpoint, also after the training has finished, for "
        "`vectorclm evaluate --every-checkpoint`; `vectorclm store gc` removes them",
    )
    hang_seconds: float = Field(
        default=600,
        ge=0,
        description="Seconds without progress in a step after which all ranks end, so that the stage is tried again; "
        "0 = never",
    )
    deterministic: bool = Field(
        default=False,
        description="On a GPU, use only deterministic kernels, which take a sixth to a quarter more time; otherwise "
        "a repeated or resumed training differs by rounding. A CPU always produces the same bytes",
    )
    parallel_stages: int = Field(
        default=0, ge=0, description="Stages that may run side by side; 0 = one for each two cores"
    )
    engine: Literal["local", "srun", "ray"] = Field(
        default="local",
        description="What starts a training on each node: local = this machine alone; srun = Slurm, inside an "
        "allocation; ray = a Ray cluster that this machine belongs to",
    )
    nodes: tuple[int, int] = Field(
        default=(1, 1),
        description="The fewest and the most nodes that train together, each with its own processes; more than one "
        "needs the engine srun or ray",
    )
    placement: Literal["inline", "pools"] = Field(
        default="inline",
        description="Where the stages of a curriculum run: inline = on the curriculum's machine; pools = each as a "
        "run of its own on a worker of the pool cpu or gpu",
    )
    allow_unsandboxed: bool = Field(
        default=False,
        description="Run the programs that a model writes even where the system offers no sandbox: they have all your "
        "rights, and can cheat the tests",
    )
    retries: int = Field(
        default=2, ge=0, description="How often a stage is retried after an error that a retry can fix"
    )
    block_cache: str | None = Field(
        default=None,
        description="Local folder that caches the blocks of tokens that a training reads from a remote store; each "
        "read verifies them; default: no folder, blocks stay in memory only",
    )
    work_dir: str | None = Field(
        default=None,
        description="Local folder for work in progress; default: inside a local store, else the cache folder",
    )

    @model_validator(mode="after")
    def _nodes_fit(self) -> Self:
        least, most = self.nodes
        if not 1 <= least <= most:
            raise ValueError(f"nodes is the fewest and the most, as in [1, 4], and not [{least}, {most}]")
        if self.engine == "local" and most > 1:
            raise ValueError(f"engine local is one machine, and cannot start {most} nodes: set engine to srun or ray")
        return self

    def check(self, group: Group = ALONE) -> None:
        """Raise ConfigError where this machine cannot run these settings."""
        processes = max(self.processes, group.local_world_size)
        here = self.engine == "local" or group.world_size > 1  # each node of another engine checks its own devices
        if here and (self.device == "cuda" or processes > 1):
            import torch

            if self.device == "cuda" and not torch.cuda.is_available():
                raise ConfigError(
                    "device is cuda, but torch sees no GPU here: use auto or cpu, or install a CUDA build"
                )
            gpus = torch.cuda.device_count()
            if processes > 1 and processes > gpus and self.torch_device().type == "cuda":
                raise ConfigError(f"{processes} processes need a GPU each, but torch sees {gpus}: lower processes")
        if self.work_dir is not None:
            try:
                Path(self.work_dir).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"work_dir {self.work_dir} cannot be created: {error.strerror}") from error

    def device_type(self) -> str:
        """The type of the torch device: cpu or cuda. torch is asked only where a GPU is possible."""
        if self.device != "auto":
            return self.device
        return self.torch_device().type if has_gpu_driver() else "cpu"

    def torch_device(self) -> "torch.device":
        """The torch device of these settings; auto is resolved."""
        import torch

        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    def training_processes(self) -> int:
        """How many processes train together on this machine."""
        if self.processes or self.device_type() == "cpu":
            return self.processes or 1
        import torch

        return torch.cuda.device_count()

    def data_processes(self, size: int) -> int:
        """How many processes build a data set from so many bytes; starting a process costs seconds."""
        return self.data_workers or (min(os.cpu_count() or 1, MOST_WORKERS) if size > LITTLE_DATA else 1)

    def threads_each(self, processes: int) -> int:
        """CPU threads of each process, for a number of processes on this machine."""
        return self.threads or max(1, (os.cpu_count() or 1) // processes)

    def windows_at_once(self, window_tokens: int, device: "torch.device") -> int:
        """Windows in one forward pass: the setting, or 2**12 tokens (CPU), 2**16 (GPU), 2**17 (GPU above 60 GB)."""
        tokens = 2**12
        if device.type == "cuda":
            import torch

            tokens = 2**17 if torch.cuda.get_device_properties(device).total_memory > 60e9 else 2**16
        return self.micro_batch_size or max(1, tokens // window_tokens)

    def steps_between_checkpoints(self, steps: int) -> int:
        """The setting, or a twentieth of a training's steps, at least 25 and at most 1,000."""
        return self.checkpoint_interval or max(25, min(1000, steps // 20))

    def configure_torch(self, group: Group = ALONE) -> "torch.device":
        """Set torch's threads and precision for this process; return the device, on GPUs that of the local rank."""
        import torch

        _keep_memory()
        gc.freeze()  # torch's modules stay, so the garbage collector need not scan them
        torch.set_num_threads(self.threads_each(group.local_world_size))
        torch.set_float32_matmul_precision("high")
        device = self.torch_device()
        if device.type == "cuda" and self.deterministic:
            os.environ.setdefault(
                "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
            )  # torch's flag forbids matrix products without this setting
            torch.use_deterministic_algorithms(True)
        if device.type == "cuda" and group.world_size > 1:
            device = torch.device("cuda", group.local_rank)
            torch.cuda.set_device(device)
        return device


def has_gpu_driver() -> bool:
    """Whether torch may find a GPU: it finds none on Linux without NVIDIA's or AMD's driver."""
    if platform.system() != "Linux":
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Path("/dev/kfd").exists()
    return True


def _keep_memory() -> None:
    """Keep freed memory in the process (glibc): each step needs it again, and new pages cost 5 % of its time."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def memory_explained(micro_batch_size: int) -> Iterator[None]:
    """Raise OutOfMemoryError, with the setting to change, where the block runs out of memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch raises RuntimeError, on GPUs a subclass
        import torch

        message = str(error)
        on_cpu, on_gpu = "DefaultCPUAllocator: can't allocate memory" in message, "out of memory" in message
        if not (on_cpu or on_gpu or isinstance(error, MemoryError | torch.OutOfMemoryError)):
            raise
        now = f"it is {micro_batch_size}" if micro_batch_size else "the memory plan chose it"
        what = message.partition("\n")[0].rpartition("] ")[2] or "the system gave none"
        raise OutOfMemoryError(
            f"out of memory ({what}): lower micro_batch_size ({now}), or take a smaller model"
        ) from error


def environment() -> dict[str, Any]:
    """Versions, hardware and git revision: what byte identity depends on besides the settings."""
    import torch
    import torch.distributed as dist

    packages = ("torch", "tokenizers", "datasets", "pyarrow", "numpy", "safetensors")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "world_size": dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1,
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),  # matters only on GPUs
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "git": git_revision(),
    }


def git_revision() -> str | None:
    """The git commit of this package, with `-dirty` for uncommitted changes; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
