"""The form of an answer in requests of OpenAI's API (`response_format`), and the base class of a request's parts."""

from collections.abc import Mapping
from typing import Any, Literal

from llguidance import LLMatcher
from pydantic import ConfigDict, Field, model_validator

from vectorclm.errors import DataError
from vectorclm.formats.json_files import parse_json
from vectorclm.inference.chat import LanguageModel
from vectorclm.inference.openai_errors import Refusal
from vectorclm.settings import Settings


class RequestModel(Settings):
    """JSON of a request, strictly typed; null means that a field is absent."""

    model_config = ConfigDict(strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, values: Any) -> Any:
        return {key: value for key, value in json_object(values).items() if value is not None}


def json_object(body: Any) -> Mapping[Any, Any]:
    """The object in a body; FastAPI hands over the bytes of a body that does not call itself JSON."""
    if isinstance(body, bytes):
        try:
            body = parse_json(body)
        except ValueError as error:
            raise Refusal(f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise ValueError("must be a JSON object")
    return body


class JsonSchema(RequestModel):
    """The JSON schema of an answer, and its name."""

    name: str = ""
    description: str = ""
    schema_: dict[str, Any] | bool = Field(default=True, alias="schema")
    strict: bool = True  # an answer always keeps to its schema


class ResponseFormat(RequestModel):
    """The form of an answer: text, any JSON object, or JSON that a schema allows."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self, model: LanguageModel) -> LLMatcher | None:
        """The grammar that an answer keeps to. Raises Refusal where the schema is missing or not supported."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return model.grammars.compile({"type": "object"})
        if self.json_schema is None:
            raise Refusal("json_schema is missing", param="response_format", code="missing_required_parameter")
        try:
            return model.grammars.compile(self.json_schema.schema_)
        except DataError as error:
            raise Refusal(str(error), param="response_format", code="invalid_value") from error
