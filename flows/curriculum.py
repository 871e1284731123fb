"""The whole mission: raw text becomes an evaluated, instruction-tuned model."""

from pathlib import Path

from prefect import flow

from flows.execution.stage_tasks import Stages
from flows.handle import Handle
from vectorclm.config import ExperimentConfig
from vectorclm.runtime.devices import Runtime


@flow(name="curriculum", flow_run_name="{experiment.name}", persist_result=False)
def curriculum(
    experiment: ExperimentConfig, runtime: Runtime, store: str, data: str | None = None, again_from: str | None = None
) -> dict[str, Handle]:
    """Make every artifact of a pinned experiment, or find it made: what each stage gave, by name.

    A stage starts when those named after it are done. Raises StageFailedError naming the first stage that
    failed; what was finished stays, and the next run reuses it. The stage `again_from` and all that is made from it
    are made again beside their artifacts, and must come out the same.
    """
    with Stages(experiment, runtime, store, Path(data) if data else None, again_from) as stage:
        sample = stage("sample")
        tokenizer = stage("tokenizer", sample)
        shards = stage("shards", sample, tokenizer)
        chat_shards = stage("chat_shards", tokenizer)
        pretrain = stage("pretrain", shards)
        finetune = stage("finetune", pretrain, chat_shards)
        evaluate_base = stage("evaluate_base", pretrain, shards)
        evaluate = stage("evaluate", finetune, chat_shards, shards)
        stage("export", pretrain, finetune, evaluate_base, evaluate)
        return stage.handles()
