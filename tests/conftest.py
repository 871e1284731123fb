"""Shared by all tests: one thread each, so that tests beside each other do not fight for cores."""

import json
import multiprocessing
import os
import resource
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

import pytest
import s3fs
import torch
from filelock import FileLock
from selenium import webdriver
from selenium.webdriver.chrome.service import Service as Driver

from flows.platform.prefect_server import PrivateServer
from tests.services import prefect_database
from tests.services.ceph import PACKAGES, object_store
from vectorclm.evaluation.sandbox import Sandbox, find_sandbox
from vectorclm.shards.blocks import ShardDescriber
from vectorclm.shards.writer import ShardWriter
from vectorclm.stages import TABLE
from vectorclm.store.artifact import Artifact, StageSpec, Store, build

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

    from tests.kill_matrix import Reference
    from tests.services.curricula import Recorded
    from vectorclm.export.llama_cpp import LlamaCpp
    from vectorclm.model import CausalLM
    from vectorclm.model_config import ModelConfig

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that spins takes the core from the test beside it
torch.set_num_threads(1)
PROCESSES = multiprocessing.get_context("forkserver")  # forked from one without the threads of other tests
PROCESSES.set_forkserver_preload(
    ["tests.store.test_storage", "tests.shards.test_block_readers", "tests.store.test_publication"]
)
KILLS = int(os.environ.get("VECTORCLM_KILLS", "5"))  # at random points of writing, and of reading
SEED = int(os.environ.get("VECTORCLM_SEED", "0"))  # chooses the cell of each slow kind that `make test` runs
CLIENTS = os.environ.get("VECTORCLM_CLIENTS") == "all"  # other programs that use a model, each installed for its test

# The files that take minutes, the longest first: they wait more than they compute, so others fill their time.
LONGEST = (
    "platform/test_platform.py",
    "platform/test_database.py",
    "platform/test_provision.py",
    "test_tiny.py",
    "execution/engines/test_ray_cluster.py",
    "test_curriculum.py",
    "shards/test_block_readers.py",
    "platform/test_doctor.py",
    "store/test_storage.py",
    "training/test_checkpoint.py",
    "runtime/test_preemption.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Reserve what the processes of this session share."""
    if not hasattr(config, "workerinput"):
        prefect_database.reserve()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        prefect_database.release()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that none of them runs alone at the end."""
    order = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def following(name: str) -> set[str]:
    """A stage and all stages that depend on it."""
    found = {name}
    for stage in TABLE:
        found |= {stage.name} if found & {*stage.inputs} else set()
    return found


def skip_or_fail(missing: str) -> NoReturn:
    """Skip a test that lacks something, and name the command that installs it; fail where CI=true."""
    pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)


T = TypeVar("T")


def one_of(cells: Sequence[T]) -> Sequence[T]:
    """One seeded cell of a slow kind; with VECTORCLM_KILLS=10 and more, all of them."""
    return cells if KILLS >= 10 else [cells[SEED % len(cells)]]


def in_turn(place: int, places: int) -> pytest.MarkDecorator:
    """Of the tests of a slow kind the seed chooses one; with VECTORCLM_KILLS=10 and more, all of them run."""
    chosen = KILLS >= 10 or SEED % places == place
    return pytest.mark.skipif(not chosen, reason="another of its kind runs: VECTORCLM_KILLS=10 runs all")


@pytest.fixture(autouse=True)
def new_s3_clients() -> Iterator[None]:
    """Forget S3 clients when a test ends: s3fs keeps them by their arguments, which name no server."""
    yield
    s3fs.S3FileSystem.clear_instance_cache()


class S3(NamedTuple):
    """A real S3 server with an empty bucket."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str

    def environment(self) -> dict[str, str]:
        """The variables by which any client finds it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """Ceph's gateway, one for all tests of a process; they keep apart by the prefix of their stores."""
    missing = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    if missing:
        skip_or_fail(f"no S3 server here: apt-get install --no-install-recommends {' '.join(missing)}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    made = S3(f"http://127.0.0.1:{port}", "of-the-tests", "secret-of-the-tests", "tests")
    folder = tmp_path_factory.mktemp("s3")
    services = object_store(folder / "ceph", folder / "logs", port, made.access_key, made.secret_key)
    try:
        for service in services:
            service.start()
            service.wait()
        client = s3fs.S3FileSystem(
            key=made.access_key, secret=made.secret_key, endpoint_url=made.endpoint, skip_instance_cache=True
        )
        client.mkdir(made.bucket)
        yield made
    finally:
        for service in reversed(services):
            service.stop()
        shutil.rmtree(folder / "ceph", ignore_errors=True)


@contextmanager
def files_below(size: int) -> Iterator[None]:
    """Let this process write no file of more than so many bytes while the block runs, as on a disk without room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> "Reference":
    """What the kill matrix compares with, made once for all processes of the tests."""
    from tests.kill_matrix import Reference

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "reference"
    with FileLock(f"{folder}.lock"):
        return Reference(folder)


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> "Recorded":
    """A very small curriculum in a store, recorded in MLflow. Tests leave its artifacts as they are."""
    from tests.services.curricula import record_mini

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return record_mini(tmp_path_factory.mktemp("recorded") / "store")


@pytest.fixture(scope="session")
def tiny_text() -> list[str]:
    """A few hundred short documents of real words with digits, punctuation and other scripts."""
    base = "The otter swims by the lake at night, and makes 12 boats. Wer singt im Wald? Ça va, 你好 🙂!\n"
    return [base.replace("otter", name) * 3 for name in ("fox", "bear", "mouse", "owl", "hare") for _ in range(40)]


def chromium(width: int, height: int, arguments: Sequence[str] = (), **capabilities: object) -> webdriver.Chrome:
    """A real browser without a screen, where one is installed."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (program and driver):
        skip_or_fail("no browser here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    own = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={width},{height}")
    for argument in (*own, *arguments):
        options.add_argument(argument)
    for name, value in capabilities.items():
        options.set_capability(f"goog:{name}", value)
    return webdriver.Chrome(options=options, service=Driver(driver))


def write_random_model(root: Path, texts: list[str], config: "ModelConfig", text_bytes: int, *, chat: bool) -> Path:
    """A model directory with weights larger than at the start of training, so that differences would show."""
    from vectorclm.export.hugging_face import write_model_files

    length = config.max_position_embeddings
    tokenizer = write_tokenizer(root, texts, config.vocab_size, text_bytes, length)
    random_model(config).save_pretrained(root / "model")
    write_model_files(tokenizer, length, chat=chat, out=root / "model")
    return root / "model"


def random_model(config: "ModelConfig") -> "CausalLM":
    """A model whose weights are the same each time, and larger than at the start of training."""
    from vectorclm.model import CausalLM

    torch.manual_seed(0)
    model = CausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def write_tokenizer(root: Path, texts: list[str], vocab_size: int, text_bytes: int, length: int) -> Path:
    """The folder of a tokenizer learnt from so many bytes of texts, for a model of context `length`."""
    from vectorclm.tokenizer import TokenizerConfig
    from vectorclm.train_tokenizer import train_tokenizer

    write_sample_text(root / "sample" / "a", texts, "train")
    (root / "tokenizer").mkdir()
    learnt = TokenizerConfig(vocab_size=vocab_size, bytes=text_bytes)
    train_tokenizer(learnt, root / "sample", length, root / "tokenizer")
    return root / "tokenizer"


def write_sample_text(folder: Path, texts: list[str], split: str) -> None:
    """A sample artifact's Parquet file, as the sample stage writes it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": texts, "id": [str(i) for i in range(len(texts))]})
    pq.write_table(table, folder / f"{split}-00000.parquet")


ANSWERS = {  # what the chat model was taught to say, whatever else it says
    "Who swims?": "The otter swims by the lake at night 🙂, and <b>makes</b> 12 boats.",
    "Who sings?": "Wer singt im Wald? 你好",
}


@pytest.fixture(scope="session")
def chat_folder(tiny_text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny chat model that knows ANSWERS by heart and ends its turns."""
    from vectorclm.export.hugging_face import write_model_files
    from vectorclm.model import CausalLM
    from vectorclm.model_config import ModelConfig
    from vectorclm.shards.conversations import Turn, render
    from vectorclm.tokenizer import TokenizerConfig, load_tokenizer
    from vectorclm.train_tokenizer import train_tokenizer

    root = tmp_path_factory.mktemp("chat")
    write_sample_text(root / "sample" / "a", [*tiny_text, "<b>makes</b>"], "train")
    (root / "tokenizer").mkdir()
    train_tokenizer(TokenizerConfig(vocab_size=320, bytes=20_000), root / "sample", 512, root / "tokenizer")
    tokenizer = load_tokenizer(root / "tokenizer")
    shape = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.model_validate({**shape, **heads, "max_position_embeddings": 512}))
    rows = []
    for question, answer in ANSWERS.items():
        ids, supervised = render(tokenizer, [Turn("user", question), Turn("assistant", answer)])
        labels = [i if taught else -100 for i, taught in zip(ids, supervised, strict=True)]
        rows.append((torch.tensor([ids]), torch.tensor([labels])))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loss = torch.tensor(torch.inf)
    for _ in range(400):
        loss = torch.stack([model.loss(ids, labels) for ids, labels in rows]).sum()
        if loss < 0.5:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5
    model.save_pretrained(root / "otter")
    write_model_files(root / "tokenizer", 512, chat=True, out=root / "otter")
    return root / "otter"


def publish_shards(store: str, work: Path, sources: Mapping[str, Mapping[str, Any]], shard_bytes: int) -> Artifact:
    """An artifact with these columns [n, T] as the training windows of each source, or as those of `source/split`."""

    def produce(out: Path) -> Mapping[str, object]:
        for label, columns in sources.items():
            place = out / label if "/" in label else out / label / "train"
            writer = ShardWriter(place, columns["input_ids"].shape[1], shard_bytes)
            writer.write(**columns)
            writer.close()
        return {}

    return build(Store(store), StageSpec("shards", 1, {}, {}), produce, str(work), ShardDescriber())[0]


def llama_cpp(file: Path) -> "LlamaCpp":
    """A GGUF file in llama.cpp, where that is installed."""
    from vectorclm.export.llama_cpp import INSTALL, LlamaCpp

    if find_spec("xllamacpp") is None:
        skip_or_fail(f"llama.cpp is not installed: {INSTALL}")
    return LlamaCpp(file)


def read_lines(path: Path) -> list[dict[str, object]]:
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mirror of the hub's sets: the real text at VECTORCLM_DATA, or generated text in the same schemas."""
    if "VECTORCLM_DATA" in os.environ:
        return Path(os.environ["VECTORCLM_DATA"])
    from tests.services.mirror import write_mirror

    folder = tmp_path_factory.mktemp("mirror")
    write_mirror(folder)
    return folder


@pytest.fixture
def sandboxed() -> Sandbox:
    """The sandbox of this system, for programs that must not run without one."""
    if (found := find_sandbox()).problem:
        skip_or_fail(f"no sandbox here ({found.problem}): apt-get install bubblewrap libseccomp2")
    return found


@contextmanager
def private_prefect(folder: Path) -> Iterator[dict[str, str]]:
    """A real server; yields the environment of a client of it, which the environment of this process does not name."""
    before = dict(os.environ)
    prefect_database.prepare(folder)
    server = PrivateServer(folder)
    try:
        server.start()
        environment = dict(os.environ)
        os.environ.clear()
        os.environ.update(before)
        server.wait()
        yield environment
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.stop()


@pytest.fixture(scope="module")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a client of a server that this module's tests have to themselves."""
    with private_prefect(tmp_path_factory.mktemp("prefect")) as environment:
        yield environment


@pytest.fixture(scope="session")
def shared_prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a client of one server for all tests that look only at runs and deployments of their own."""
    with private_prefect(tmp_path_factory.mktemp("shared-prefect")) as environment:
        yield environment


@pytest.fixture
def prefect_client(shared_prefect: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator["SyncPrefectClient"]:
    """A client of the shared server, which Prefect's functions in this process and its threads use, too."""
    from prefect.client.orchestration import get_client
    from prefect.context import refresh_global_settings_context

    with monkeypatch.context() as patch:
        for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING"):
            patch.setenv(name, shared_prefect[name])
        refresh_global_settings_context()
        with get_client(sync_client=True) as client:
            yield client
    refresh_global_settings_context()
