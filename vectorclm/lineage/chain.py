"""Lineage of models: the chain of artifacts back to the data sources, read only from the manifests of a store.

A fingerprint covers a stage's settings and the fingerprints of its inputs, so the chain is a Merkle tree: `verify`
recomputes every fingerprint from its manifest, and the hash of every file.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vectorclm.errors import CorruptArtifactError, DataError
from vectorclm.formats.limits import CHAIN, TREE
from vectorclm.stages import BY_NAME, EVALUATED, EXPORTED, LANGUAGE_MODELS
from vectorclm.store.artifact import MANIFEST, Artifact, StageSpec, Store, repair_advice
from vectorclm.store.layout import EXPORT, MEASURE, STAGES
from vectorclm.store.model_ref import ADDRESS, Model, content_of, expand_prefix, find_model
from vectorclm.store.result import ArtifactStorage

SHORT = 12  # digits of a fingerprint in output
PREFIX = 6  # digits that name a revision


def _figure(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _draws(stage: str) -> bool:
    """Whether the settings of a stage name sources of training data."""
    return stage in BY_NAME and BY_NAME[stage].draws


class SourceRead(NamedTuple):
    """A source of training data at its revision: a commit of the hub, or `sha256:` of the content."""

    label: str
    revision: str
    path: str  # hub id and config; empty for a source that its content identifies


@dataclass(frozen=True)
class Node:
    """An artifact in a chain, with its inputs."""

    stage: str
    fingerprint: str
    artifact: Artifact | None  # None where the store no longer has it
    inputs: tuple["Node", ...] = ()
    sources: tuple[SourceRead, ...] = ()

    @property
    def title(self) -> str:
        """The name of the stage's result in output."""
        return (BY_NAME[self.stage].result if self.stage in BY_NAME else "") or self.stage

    @property
    def names(self) -> Any:
        """Stages, fingerprints and sources of the chain, nested; two records of the same model must agree in these."""
        inputs = sorted((node.names for node in self.inputs), key=lambda names: str(names["stage"]))
        sources = sorted([source.label, source.revision] for source in self.sources)
        return {"stage": self.stage, "fingerprint": self.fingerprint, "inputs": inputs, "sources": sources}


@dataclass(frozen=True)
class Lineage:
    """A model's chain and scores, and the copy of the model that was asked about."""

    root: Node
    scores: tuple[Artifact, ...] = ()
    copy: Artifact | None = None  # the export that contains the address
    folder: Path | None = None  # the folder of a copy outside any store
    nodes: Mapping[str, Node] = field(default_factory=dict)  # the whole chain by fingerprint, inputs first

    @property
    def stages(self) -> dict[str, Node]:
        """The chain by stage."""
        return {node.stage: node for node in self.nodes.values()}


class Change(NamedTuple):
    """A difference between two models at one place; None where a model has no value."""

    place: str  # `pretrain.optimizer.learning_rate`
    before: Any
    after: Any


def lineage(address: str, store: Store) -> Lineage:
    """The lineage of `<store>/<stage>/<fingerprint>`, of a folder in it, or of any copy of a model in `store`.

    An abbreviated address such as `finetune/7fa0` is looked up in `store`. Raises DataError where nothing is found,
    and ConfigError where several artifacts match.
    """
    artifact, inside, folder = _find(address, store)
    export = artifact if artifact.stage == EXPORT else None
    if export is not None:
        stage, fingerprint = _exported(export, inside)
        model = export.store.look_up(stage, fingerprint)
        if model is None:
            raise DataError(
                f"{export.store.uri} no longer has {stage}/{fingerprint}, from which {export.uri} was built"
            )
        artifact = model
    nodes = _chain(artifact)
    root = nodes[artifact.fingerprint]
    return Lineage(root, tuple(_scores(root)), export, folder, nodes)


def trained_on(model: Model, store: Store) -> dict[str, Artifact]:
    """The artifacts with a model's training text that the store has: `sample`, and `chat_shards` for a chat model."""
    training = training_of(model, store)
    nodes = _chain(training).values() if training is not None else ()
    return {node.stage: node.artifact for node in nodes if _draws(node.stage) and node.artifact is not None}


def sources_of(artifact: Artifact) -> list[SourceRead]:
    """All sources of the training data of an artifact, those of its inputs included, ordered by label."""
    return sorted({source for node in _chain(artifact).values() for source in node.sources})


def models_that_read(source: str, store: Store) -> list[tuple[Artifact, SourceRead]]:
    """All models of a store that were trained on a source, each with the source at the revision that was read.

    `source` is the label, the path, the revision, or the first 6 digits or more of the revision. Raises DataError where
    no model of the store has read it, naming the sources that were read.
    """
    found, known = list[tuple[Artifact, SourceRead]](), set[str]()
    for stage in LANGUAGE_MODELS:
        for model in store.finished(stage):
            for read in sources_of(model):
                known.add(read.label)
                if _is_named(source, read):
                    found.append((model, read))
    if not found:
        names = f"its models have read {', '.join(sorted(known))}" if known else "it has no model"
        raise DataError(f"no model of {store.uri} has read {source}: {names}")
    return sorted(found, key=lambda item: str(item[0].manifest["created"]))


def _is_named(source: str, read: SourceRead) -> bool:
    revision = read.revision.removeprefix("sha256:")
    begins = len(source.removeprefix("sha256:")) >= PREFIX and revision.startswith(source.removeprefix("sha256:"))
    return begins or source in (read.label, read.path, f"{read.path}@{read.revision}")


def _exported(export: Artifact, inside: str) -> tuple[str, str]:
    """Stage and fingerprint of the training whose model is at a path inside an export."""
    inputs = export.manifest.get("inputs", {})
    last = next((stage for stage in LANGUAGE_MODELS if stage in inputs), EXPORTED["chat"])
    stage = EXPORTED.get(inside.partition("/")[0], last)
    return stage, str(inputs.get(stage))


def training_of(model: Model, store: Store) -> Artifact | None:
    """The training artifact of a model: that of the artifact that its address names, or else of the same content."""
    match = ADDRESS.fullmatch(model.address)
    if match is not None and Store(match["root"]).uri == store.uri:
        named, inside = store.look_up(match["stage"], match["fingerprint"]), match["inside"] or ""
        if named is not None and named.stage == EXPORT and content_of(named, f"{inside}/") == model.content:
            return store.look_up(*_exported(named, inside))
        if named is not None and named.stage in LANGUAGE_MODELS and content_of(named) == model.content:
            return named
    for artifact in (one for stage in LANGUAGE_MODELS for one in store.finished(stage)):
        if content_of(artifact) == model.content:
            return artifact
    for export in store.finished(EXPORT):  # its files say more to other programs than those of the training
        for inside in EXPORTED:
            if content_of(export, f"{inside}/") == model.content:
                return store.look_up(*_exported(export, inside))
    return None


def _find(address: str, store: Store) -> tuple[Artifact, str, Path | None]:
    """The artifact at an address, the path inside it, and the folder where the address is a copy outside a store."""
    address = expand_prefix(address, store)
    place = address if "://" in address else str(Path(address).absolute())
    match = ADDRESS.fullmatch(place)
    if match is not None:
        artifact = Store(match["root"]).look_up(match["stage"], match["fingerprint"])
        if artifact is None:
            raise DataError(f"{match['root']} has no finished {match['stage']}/{match['fingerprint']}")
        return artifact, match["inside"] or "", None
    artifact = training_of(find_model(address), store)
    if artifact is None:
        raise DataError(
            f"no model of {store.uri} has the content of {address}: name the store it comes from with --store"
        )
    return artifact, "", Path(place)


def _chain(artifact: Artifact) -> dict[str, Node]:
    """An artifact and all its direct and indirect inputs, by fingerprint, inputs first."""
    nodes: dict[str, Node] = {}
    _node(artifact.store, artifact.stage, artifact.fingerprint, nodes, CHAIN)
    sizes: dict[str, int] = {}
    for key, node in nodes.items():  # a tree repeats shared inputs, and a forged one would repeat them without end
        sizes[key] = 1 + sum(sizes.get(part.fingerprint, 1) for part in node.inputs)
        if sizes[key] > TREE:
            raise CorruptArtifactError(f"{artifact.uri}: its tree of inputs has more than {TREE:,} artifacts")
    return nodes


def _node(store: ArtifactStorage, stage: str, fingerprint: str, known: dict[str, Node], deep: int) -> Node:
    """The node of an artifact, of at most `deep` stages.

    Raises CorruptArtifactError where a manifest is not a valid one of its stage, or the chain is longer.
    """
    if fingerprint in known:
        return known[fingerprint]
    if deep == 0:
        raise CorruptArtifactError(f"{store.uri}/{stage}/{fingerprint} is the end of a chain of {CHAIN} artifacts")
    artifact = store.look_up(stage, fingerprint)
    if artifact is None:
        node = Node(stage, fingerprint, None)
    else:
        try:
            before = {**known, fingerprint: Node(stage, fingerprint, artifact)}  # a forged chain may be circular
            inputs = [
                _node(store, name, print_, before, deep - 1) for name, print_ in artifact.manifest["inputs"].items()
            ]
            known.update({key: node for key, node in before.items() if key != fingerprint})
            node = Node(stage, fingerprint, artifact, tuple(inputs), tuple(_sources(stage, artifact)))
            _described(node), facts(node), artifact.manifest["created"]  # raises where a reported value is missing
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CorruptArtifactError(
                f"{artifact.uri}/{MANIFEST} is not a manifest of {stage}: {error!r}; {repair_advice(artifact)}"
            ) from error
    known[fingerprint] = node
    return node


def _sources(stage: str, artifact: Artifact | None) -> Iterator[SourceRead]:
    if artifact is not None and _draws(stage):
        for source in artifact.manifest["config"]["sources"]:
            path = "/".join(source[key] for key in ("path", "name") if source.get(key))
            yield SourceRead(source["label"], str(source.get("revision")), path)


def _scores(root: Node) -> Iterator[Artifact]:
    """All evaluation results of the model in its store, of any suite."""
    if root.artifact is None or root.stage not in LANGUAGE_MODELS:
        return
    store, content = root.artifact.store, content_of(root.artifact)
    for stage in (*EVALUATED, MEASURE):
        for found in store.finished(stage):
            inputs = found.manifest.get("inputs", {})
            if stage == MEASURE:
                of_it = content is not None and inputs.get("model") == content
            else:
                of_it = EVALUATED[stage] == root.stage and inputs.get(root.stage) == root.fingerprint
            if of_it:
                yield found


def verify(found: Lineage) -> Iterator[str]:
    """Verify every artifact of a lineage against its manifest, and yield a line for each difference.

    The scores and the copy that was asked about are verified, too.
    """
    for node in found.nodes.values():
        if node.artifact is None:
            yield f"{node.stage}/{node.fingerprint} is gone from the store: its inputs are unknown"
    chain = [node.artifact for node in found.nodes.values() if node.artifact is not None]
    for artifact in (*chain, *found.scores, *([found.copy] if found.copy is not None else [])):
        manifest = artifact.manifest
        spec = StageSpec(artifact.stage, manifest["format_version"], manifest["config"], manifest["inputs"])
        if spec.fingerprint != artifact.fingerprint:
            yield (
                f"{artifact.uri}/{MANIFEST}: the fingerprint of its settings and inputs is {spec.fingerprint[:12]}…, "
                "not that of its folder: the manifest was changed"
            )
        yield from artifact.differences()
    root = found.root.artifact
    if found.copy is not None and root is not None:
        inside = f"{BY_NAME[root.stage].model}/"
        if content_of(found.copy, inside) != content_of(root):
            yield f"{found.copy.uri}/{inside} is not the model of {root.uri}"


def facts(node: Node) -> dict[str, Any]:
    """The main figures of an artifact: its size, and its quality."""
    if node.artifact is None or node.stage not in BY_NAME:
        return {}
    return dict(BY_NAME[node.stage].figures(node.artifact.summary))


def score_facts(scores: Artifact) -> dict[str, float]:
    """Accuracy of each task and bits per byte of each text, of an evaluation of any kind."""
    summary = scores.summary
    found = {f"acc.{label}": task["acc"] for label, task in summary["tasks"].items()}
    for label, text in summary.get("text", {}).items():
        found[f"bits_per_byte.{label}"] = text["bits_per_byte"]
    for label, value in summary.get("bits_per_byte", {}).items():
        found[f"bits_per_byte.{label}"] = value
    return found


def as_object(found: Lineage) -> dict[str, Any]:
    """The whole lineage as `--json` prints it; a shared input is repeated under each artifact."""
    scores = [{"uri": item.uri, "stage": item.stage, "scores": score_facts(item)} for item in found.scores]
    return {"tree": _as_object(found.root), "scores": scores}


def _as_object(node: Node) -> dict[str, Any]:
    about: dict[str, Any] = {"missing": True}
    if node.artifact is not None:
        manifest = node.artifact.manifest
        about = {"uri": node.artifact.uri, "created": manifest["created"], "git": manifest["environment"].get("git")}
    return {
        "stage": node.stage,
        "fingerprint": node.fingerprint,
        **about,
        "facts": facts(node),
        "sources": [source._asdict() for source in node.sources],
        "inputs": [_as_object(part) for part in node.inputs],
    }


def changes(before: Lineage, after: Lineage) -> list[Change]:
    """The differences between two models: settings, sources, inputs, versions and scores, in pipeline order."""
    found: list[Change] = []
    for stage in STAGES:
        nodes = [side.stages.get(stage) for side in (before, after)]
        if None in nodes:  # only one of the two models has this stage
            found.append(Change(stage, *(node.fingerprint if node is not None else None for node in nodes)))
            continue
        a, b = (_described(node) for node in nodes)
        found += [Change(f"{stage}.{key}", a.get(key), b.get(key)) for key in {**a, **b}]
    sides = [
        {f"scores.{key}": value for item in side.scores for key, value in _named(item)} for side in (before, after)
    ]
    found += [Change(key, *(side.get(key) for side in sides)) for key in {**sides[0], **sides[1]}]
    return [change for change in found if change.before != change.after]


def _named(scores: Artifact) -> Iterator[tuple[str, float]]:
    suite = f"{scores.manifest['config']['suite']}." if scores.stage == MEASURE else ""
    for key, value in score_facts(scores).items():
        yield suite + key, value


def _described(node: Node | None) -> dict[str, Any]:
    """The settings, inputs and versions of an artifact, flattened."""
    if node is None:
        return {}
    if node.artifact is None:
        return {"fingerprint": node.fingerprint}
    manifest = node.artifact.manifest
    return {
        **_flat(manifest["config"]),
        **{f"input {stage}": fingerprint for stage, fingerprint in manifest["inputs"].items()},
        "format_version": manifest["format_version"],
        **{f"made with {key}": value for key, value in manifest["environment"].items()},
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to keys such as `a.b.0.c`; a labelled list item has its label instead of its index."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Sequence) and value and all(isinstance(item, Mapping) for item in value):
            value = {str(item.get("label", number)): item for number, item in enumerate(value)}
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def describe_node(node: Node) -> str:
    """Format the main figures of an artifact in one line."""
    return ", ".join(f"{_figure(value)} {key.replace('_', ' ')}" for key, value in facts(node).items())
