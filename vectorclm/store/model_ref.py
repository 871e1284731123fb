"""Model addresses: find a model in a local folder or a store, and its content hash, without loading the model."""

import glob
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from vectorclm.errors import ConfigError, CorruptArtifactError, DataError, StoreError, VectorCLMError
from vectorclm.formats.json_files import parse_json
from vectorclm.settings import digest
from vectorclm.store.artifact import MANIFEST, Artifact, Store, default_store, repair_advice
from vectorclm.store.layout import STAGES
from vectorclm.tokenizer import IM_END

MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)  # the files that scores depend on
# An artifact of a store, or a folder inside an artifact.
ADDRESS = re.compile(r"(?P<root>.+)/(?P<stage>[a-z_]+)/(?P<fingerprint>[0-9a-f]{64})(/(?P<inside>.+))?")
CANDIDATES, CANDIDATE_DIGITS = 8, 12  # artifacts in a message, and digits of each
SHORT = re.compile(r"((?P<root>.+)/)?(?P<stage>[a-z_]+)/(?P<start>[0-9a-f]{3,64})(/(?P<inside>.+))?")


@dataclass(frozen=True)
class Model:
    """A model that was found, but not loaded."""

    address: str
    content: str  # SHA-256 over the files that scores depend on
    chat: bool  # whether the model ends its texts with an end-of-turn token
    artifact: Artifact | None = None  # of a model in a store
    inside: str = ""  # the model's folder in that artifact

    def local(self) -> Path:
        """A local directory with the model's files; files from a store are verified, once for each change.

        Raises CorruptArtifactError where a file differs from the manifest.
        """
        if self.artifact is None:
            return Path(self.address)
        return self.artifact.local(f"{glob.escape(self.inside)}*", remembered=True) / self.inside

    def verify(self, store: Store) -> None:
        """Verify the model's files, unless they lie in `store`, the remote store that keeps the results.

        A forged manifest could claim the content of a better model, and so its scores. Raises CorruptArtifactError
        where a file differs from the manifest.
        """
        if self.artifact is not None and (self.artifact.store.is_local or self.artifact.store.uri != store.uri):
            self.local()


def find_model(address: str) -> Model:
    """Find the model in a local folder, or at `<store>/<stage>/<fingerprint>`, without loading the model.

    The beginning of a fingerprint is enough, and the store defaults to the default store (see `expand_prefix`).
    Raises DataError where there is no model, StoreError where the store cannot be read, and ConfigError for an
    address of another kind.
    """
    if address.startswith("models:/"):
        raise ConfigError(f"{address} is known only to MLflow: use the `vectorclm` command or the platform")
    address = expand_prefix(address)
    if "://" in address:
        return _find_in_store(address)
    folder = Path(address).absolute()
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}: a model is a local folder, or <store>/<stage>/<fingerprint>")
    if (place := _place_in_store(folder)) is not None:
        return _find_in_store(place)
    names = {path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("*/config.json"))}
    _check_files(str(folder), names)
    prints = {}
    for name in MODEL_FILES:
        with (folder / name).open("rb") as file:
            prints[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return Model(str(folder), digest(prints), _is_chat((folder / "tokenizer_config.json").read_bytes(), address))


def expand_prefix(address: str, store: Store | None = None) -> str:
    """Complete the fingerprint of an address that has its first digits; return any other address unchanged.

    An address without a store, such as `finetune/7fa0`, refers to `store`, or else to the default store. Raises
    ConfigError where several artifacts match, DataError where none matches, and StoreError where the store cannot be
    read.
    """
    address = address.rstrip("/")
    match = SHORT.fullmatch(address)
    if match is None or ADDRESS.fullmatch(address) or Path(address).is_dir():
        return address
    place = Store(match["root"]) if match["root"] else store or Store(default_store())
    try:
        found = [name for name in place.list(match["stage"]) if name.startswith(match["start"])]
    except VectorCLMError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise StoreError(f"{place.uri} cannot be read: {str(error) or type(error).__name__}") from error
    if len(found) > 1:
        names = ", ".join(f"{match['stage']}/{name[:CANDIDATE_DIGITS]}" for name in found[:CANDIDATES])
        more = f" and {len(found) - CANDIDATES:,} more" if len(found) > CANDIDATES else ""
        raise ConfigError(f"{address} matches {len(found)} artifacts of {place.uri}: {names}{more}; write more digits")
    if not found:
        raise DataError(f"{place.uri} has no finished {match['stage']}/{match['start']}…")
    return "/".join([place.uri, match["stage"], found[0], *([match["inside"]] if match["inside"] else [])])


def _place_in_store(folder: Path) -> str | None:
    """The address of a local folder inside an artifact of a store, also through links; None for other folders."""
    for place in (str(folder), str(folder.resolve())):
        if match := ADDRESS.fullmatch(place):
            manifest = Path(match["root"], match["stage"], match["fingerprint"], MANIFEST)
            if manifest.exists() or match["stage"] in STAGES:
                return place
    return None


def _find_in_store(address: str) -> Model:
    match = ADDRESS.fullmatch(address)
    if match is None:
        raise ConfigError(f"{address}: a model in a store is <store>/<stage>/<fingerprint>")
    key, inside = f"{match['stage']}/{match['fingerprint']}", f"{match['inside']}/" if match["inside"] else ""
    try:
        store = Store(match["root"])
        artifact = store.find(match["stage"], match["fingerprint"])
        tokenizer = store.read(f"{key}/{inside}tokenizer_config.json")
    except VectorCLMError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise StoreError(f"{match['root']} cannot be read: {str(error) or type(error).__name__}") from error
    if artifact is None:
        raise DataError(f"{match['root']} has no finished {key}")
    files = artifact.manifest["files"]
    _check_files(address, {name.removeprefix(inside) for name in files if name.startswith(inside)})
    prints = {name: files[inside + name]["sha256"] for name in MODEL_FILES}
    if tokenizer is None or hashlib.sha256(tokenizer).hexdigest() != prints["tokenizer_config.json"]:
        raise CorruptArtifactError(
            f"{address}/tokenizer_config.json differs from the manifest: {repair_advice(artifact)}"
        )
    return Model(address, digest(prints), _is_chat(tokenizer, address), artifact, inside)


def _check_files(where: str, names: set[str]) -> None:
    if lost := [name for name in MODEL_FILES if name not in names]:
        inner = sorted(name.partition("/")[0] for name in names if name.endswith("/config.json"))
        hint = f"; the models in it are {', '.join(f'{where}/{name}' for name in inner)}" if inner else ""
        raise DataError(f"{where} is not a model directory: it lacks {', '.join(lost)}{hint}")


def _is_chat(tokenizer_config: bytes, where: str) -> bool:
    """Whether the model's end-of-text token is the end of a turn."""
    try:
        eos = parse_json(tokenizer_config)["eos_token"]
        return bool((eos["content"] if isinstance(eos, dict) else eos) == IM_END)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: tokenizer_config.json names no eos_token: {error!r}") from error


def content_of(artifact: Artifact, inside: str = "") -> str | None:
    """The content hash of a model from its manifest, equal to `Model.content`; None where files are missing."""
    files = artifact.manifest["files"]
    if any(inside + name not in files for name in MODEL_FILES):
        return None
    return digest({name: files[inside + name]["sha256"] for name in MODEL_FILES})
