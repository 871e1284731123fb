"""Settings of a measurement."""

from pydantic import Field

from vectorclm.settings import Settings


class Limits(Settings):
    """How much is measured."""

    items: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        title="Questions",
        description="Questions of each task; 0 = as many as the suite asks",
    )
    documents: int = Field(
        default=200,
        ge=2,
        le=100_000,
        title="Held-out documents",
        description="Held-out documents of each source, 2 to 100,000",
    )
    prompts: int = Field(
        default=0,
        ge=0,
        le=100_000,
        title="Held-out conversations",
        description="Held-out conversations whose answers are checked; 0 = the suite's number",
    )
    max_new_tokens: int = Field(
        default=0,
        ge=0,
        le=4096,
        title="Longest answer",
        description="Longest answer, in tokens, to 4,096; 0 = the suite's",
    )
    template: bool = Field(
        default=False, title="Chat template", description="Ask a chat model the benchmarks in its chat template"
    )
    run_code: bool = Field(
        default=False,
        title="Run programs",
        description="Run the programs that the model writes (HumanEval), in a sandbox; without one, they do not run",
    )
