import os
from typing import Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Animal(BaseModel):
    """An animal."""

    name: str = Field(max_length=12)
    kind: Literal["otter", "owl"]
    legs: int = Field(ge=0, le=99)


# It leaves out the field of its own: it takes every unknown model for one that reasons.
provider = OpenAIProvider(base_url=os.environ["BASE_URL"], api_key=os.environ["KEY"])
model = OpenAIChatModel("otter", provider=provider, settings={"extra_body": {"temperature": 0}})
print(Agent(model).run_sync("Who swims?").output)
print(Agent(model, output_type=NativeOutput(Animal)).run_sync("Who swims?").output.model_dump_json())
