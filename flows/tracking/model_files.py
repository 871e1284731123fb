"""The files of a logged model in MLflow: MLmodel, signature, input example, tokenizer and a reference to the weights.

The weights stay in the store. `mlflow.pyfunc` loads them through the reference (see `pyfunc_model`),
`mlflow.transformers` through the path of a local store, or through the path that its `base_model_path` names.
"""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import LoggedModel
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array

from flows.tracking.pyfunc_model import MAX_NEW_TOKENS, REFERENCE, content
from vectorclm.inference.config import SamplingParams
from vectorclm.lineage.chain import SHORT
from vectorclm.store.artifact import Artifact
from vectorclm.store.model_ref import find_model

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
LOADER = "flows.tracking.pyfunc_model"
EXAMPLE = ["Where does the otter live?"]
SEED = 0  # the default of the parameter: equal calls give equal answers


def write_model_files(folder: Path, logged: LoggedModel, artifact: Artifact) -> None:
    """Write the files of the logged model of a tokenizer or of a language model into the empty `folder`."""
    reference, name = folder / "reference", {"stage": artifact.stage, "fingerprint": artifact.fingerprint}
    reference.mkdir(parents=True)
    fields = {**name, "content": content(artifact), "store": artifact.store.uri}
    (reference / REFERENCE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    is_tokenizer = artifact.stage == "tokenizer"
    model = Model(
        artifact_path=logged.artifact_location,
        run_id=logged.source_run_id,
        model_uuid=logged.model_id,
        model_id=logged.model_id,
        metadata={**name, "uri": artifact.uri},
    )
    out = folder / "model"
    tokenizer = out / "components" / "tokenizer"
    if not is_tokenizer:
        model.add_flavor("transformers", **_transformers_flavor(artifact))
    mlflow.pyfunc.save_model(
        str(out),
        loader_module=LOADER,
        data_path=str(reference),
        mlflow_model=model,
        signature=_tokenizer_signature() if is_tokenizer else _text_signature(),
        input_example=EXAMPLE,
        pip_requirements=[f"vectorclm=={version('vectorclm')}"],
    )
    tokenizer.mkdir(parents=True)
    for file in TOKENIZER_FILES:
        (tokenizer / file).write_bytes(artifact.read(file))


def _text_signature() -> ModelSignature:
    """Text in, text out, with the sampling settings as parameters."""
    text = Schema([ColSpec(DataType.string)])
    params = [ParamSpec("max_new_tokens", DataType.long, MAX_NEW_TOKENS)]
    for name, field in SamplingParams.model_fields.items():
        default = SEED if name == "seed" else field.default
        params.append(ParamSpec(name, DataType.long if isinstance(default, int) else DataType.double, default))
    return ModelSignature(text, text, ParamSchema(params))


def _tokenizer_signature() -> ModelSignature:
    """Text in, token ids out."""
    return ModelSignature(Schema([ColSpec(DataType.string)]), Schema([ColSpec(Array(DataType.long))]))


def _transformers_flavor(artifact: Artifact) -> Mapping[str, Any]:
    config = json.loads(artifact.read("config.json"))
    tokenizer = json.loads(artifact.read("tokenizer_config.json"))
    return {
        "task": "text-generation",
        "instance_type": "TextGenerationPipeline",
        "framework": "pt",
        "pipeline_model_type": config["architectures"][0],
        "source_model_name": artifact.uri,
        "local_base_model_path": artifact.uri,
        "components": ["tokenizer"],
        "tokenizer_type": tokenizer["tokenizer_class"],
    }


def loading_lines(name: str, number: str, artifact: Artifact) -> str:
    """How to load a registered version, as markdown: through MLflow, through transformers, and on the command line."""
    address = f"models:/{name}/{number}"
    lines = ["```python", f'mlflow.pyfunc.load_model("{address}").predict(["{EXAMPLE[0]}"])']
    if artifact.stage != "tokenizer":
        if artifact.store.is_local:
            lines += [f'mlflow.transformers.load_model("{address}")', "# and wherever the store is now:"]
        lines += [
            f"from {find_model.__module__} import {find_model.__name__}",
            f'model = find_model("{artifact.store.uri_of(artifact.stage)}/{artifact.fingerprint[:SHORT]}")',
            f'mlflow.transformers.load_model("{address}", base_model_path=model.local())',
        ]
    return "\n".join([*lines, "```"])
