"""Settings of an evaluation: benchmarks, prompts, and the length of answers."""

from typing import Self

from pydantic import Field, model_validator

from vectorclm.corpus.sources import TaskSource, check_labels
from vectorclm.settings import Settings


class Questions(Settings):
    """The questions of an evaluation."""

    tasks: list[TaskSource] = Field(default=[], description="Benchmarks")
    prompts: list[str] = Field(default=[], description="Questions whose answers are shown")
    chat_prompts: int = Field(
        default=100, ge=1, description="Held-out conversations whose answers are checked for the template"
    )
    max_new_tokens: int = Field(default=128, ge=1, description="Longest answer to a prompt, in tokens")
    repetition_penalty: float = Field(
        default=1.0,
        ge=0.01,
        le=100,
        exclude_if=lambda penalty: penalty == 1,
        description="Of answers: above 1, tokens of the prompt and the answer become less likely",
    )
    instructions: int = Field(
        default=0,
        ge=0,
        le=200,
        exclude_if=lambda count: count == 0,
        description="Prompts whose following a program checks, of the base and the chat model; 0 = none, 200 = all",
    )

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        check_labels(self.tasks)
        return self


class EvaluateConfig(Questions):
    """The evaluation of an experiment's models."""

    prompts: list[str] = Field(min_length=1, description="Questions the chat model answers in the summary")

    @model_validator(mode="after")
    def _is_safe(self) -> Self:
        if unsafe := [task.label for task in self.tasks if task.runs_code]:
            raise ValueError(
                f"{', '.join(unsafe)} run programs that the model writes: only `vectorclm evaluate MODEL --suite NAME "
                "--run-code` does that"
            )
        return self
