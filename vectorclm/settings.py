"""Base class of all configs (frozen, strict pydantic models), their validation messages and their SHA-256 digest."""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, SecretStr, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from vectorclm.errors import ConfigError

SUGGESTIONS, FAULTS = 3, 50  # that a message names
NAME, NAME_LENGTH = r"^[a-z0-9][a-z0-9_.-]*$", 64  # of experiments, suites and sources: parts of file names and metrics
LARGEST_WEIGHT = 1e15  # weights are relative; a sum of larger ones may leave the range of a number


class Settings(BaseModel):
    """A frozen group of settings; a key that no field declares is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The JSON schema that Prefect's run form needs.

        Every field has its position, because some databases sort keys. A field that may be None becomes optional.
        """
        found = handler(schema)
        for position, field in enumerate(handler.resolve_ref_schema(found).get("properties", {}).values()):
            field["position"] = position
            kinds = [kind for kind in field.get("anyOf", ()) if kind != {"type": "null"}]
            if len(kinds) == 1 and field.get("default", ...) is None:
                del field["anyOf"], field["default"]
                field |= kinds[0]
        return found


def canonical_json(value: Any) -> str:
    """`value` as JSON with sorted keys and no spaces: equal values have equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


S = TypeVar("S", bound=Settings)


def validate(cls: type[S], values: Mapping[str, Any], where: str) -> S:
    """Build a `cls` from `values`. Raises ConfigError that names every bad key, its value and the valid keys."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        lines = [_explain(cls, item) for item in error.errors(include_url=False)[:FAULTS]]
        left = f"\n  and {error.error_count() - FAULTS:,} more" if error.error_count() > FAULTS else ""
        raise ConfigError(f"{where}:\n" + "\n".join(f"  {line:.2000}" for line in lines) + left) from None


def _explain(cls: type[BaseModel], item: Any) -> str:
    """One line for one pydantic error: the key's full path, the fault, the valid keys. Never shows a secret."""
    path = item["loc"]
    key = ".".join(str(part) for part in path)
    if item["type"] != "extra_forbidden":
        shows_value = path and item["type"] != "missing" and not _holds_secret(_place(cls, path)[1])
        given = f" (got {item['input']!r})" if shows_value else ""
        return f"{key or 'settings'}: {item['msg'].removeprefix('Value error, ')}{given if len(given) < 200 else ''}"
    here = _place(cls, path[:-1])[0]
    known = list(here.model_fields)
    meant = (
        _keys_called(str(path[-1]), here, [*path[:-1]])
        or difflib.get_close_matches(str(path[-1]), known, n=1)
        or _keys_called(str(path[-1]), cls, [])
    )
    shown = " or ".join(map(repr, meant[:SUGGESTIONS]))
    first = " (0: the first of the list)" if ".0." in shown and ".0." not in key else ""
    hint = f"; did you mean {shown}{first}?" if meant else ""
    return f"{key}: unknown key{hint} (known here: {', '.join(known)})"


def _keys_called(name: str, cls: type[BaseModel], inside: Sequence[int | str]) -> list[str]:
    """The dotted keys of this name in `cls`, whose own key is `inside`, and in its groups; 0 for one of a list."""
    found = []
    for key, field in cls.model_fields.items():
        place = [*inside, key]
        if key == name:
            found.append(".".join(map(str, place)))
        elif (group := _settings_in(field.annotation)) is not None:
            found += _keys_called(name, group, [*place, 0] if _is_list(field.annotation) else place)
    return found


def _place(cls: type[BaseModel], path: tuple[int | str, ...]) -> tuple[type[BaseModel], Any]:
    """The settings class at `path` inside `cls`, through lists and optional fields, and the annotation there."""
    annotation: Any = cls
    for part in path:
        if isinstance(part, str) and part in cls.model_fields:
            annotation = cls.model_fields[part].annotation
            cls = _settings_in(annotation) or cls
    return cls, annotation


def _holds_secret(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return any(_holds_secret(field.annotation) for field in annotation.model_fields.values())
    return annotation is SecretStr or any(_holds_secret(arg) for arg in get_args(annotation))


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is list or any(_is_list(arg) for arg in get_args(annotation))


def _settings_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _settings_in(arg))), None)
