"""Settings of text generation."""

from pydantic import Field

from vectorclm.settings import Settings


class SamplingParams(Settings):
    """Sampling parameters: how the next token is drawn. The defaults do not change the model's probabilities."""

    temperature: float = Field(default=0.0, ge=0, le=100, description="Divides the logits; 0 takes the likeliest token")
    top_k: int = Field(default=0, ge=0, description="Draw from so many of the likeliest tokens; 0 = from all")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Draw from the likeliest tokens that hold this much probability"
    )
    min_p: float = Field(
        default=0.0, ge=0, le=1, description="Draw from tokens at least this share as probable as the likeliest one"
    )
    repetition_penalty: float = Field(
        default=1.0, ge=0.01, le=100, description="Above 1, tokens of the prompt and the answer become less likely"
    )
    seed: int | None = Field(
        default=None, ge=-(2**63), lt=2**63, description="Equal seeds repeat an answer; without one each is new"
    )


GREEDY = SamplingParams(temperature=0.0)
