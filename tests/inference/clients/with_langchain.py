import os
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field


class Animal(BaseModel):
    """An animal."""

    name: str = Field(max_length=12)
    kind: Literal["otter", "owl"]
    legs: int = Field(ge=0, le=99)


model = ChatOpenAI(model="otter", base_url=os.environ["BASE_URL"], api_key=os.environ["KEY"], temperature=0)
print(model.invoke("Who swims?").content)
print("".join(chunk.content for chunk in model.stream("Who swims?")))
print(model.with_structured_output(Animal, method="json_schema").invoke("Who swims?").model_dump_json())
