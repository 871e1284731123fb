"""The base of every config class: frozen, strict, and hashable to a fingerprint."""

import difflib
import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from vectorclm.errors import ConfigError


class Settings(BaseModel):
    """A frozen group of settings; a key that no field declares is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def canonical_json(value: Any) -> str:
    """`value` as JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


S = TypeVar("S", bound=Settings)


def validate(cls: type[S], values: Mapping[str, Any], where: str) -> S:
    """`values` as a `cls`. Raises ConfigError that names every bad key, its value and its neighbours."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        lines = [_explain(cls, item) for item in error.errors(include_url=False)]
        raise ConfigError(f"{where}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def _explain(cls: type[BaseModel], item: Any) -> str:
    """One line for one pydantic error: the key's full path, what was wrong, what would be right."""
    path = item["loc"]
    key = ".".join(str(part) for part in path)
    if item["type"] != "extra_forbidden":
        given = "" if item["type"] == "missing" else f" (got {item['input']!r})"
        return f"{key or 'settings'}: {item['msg'].removeprefix('Value error, ')}{given if len(given) < 200 else ''}"
    known = list(_class_at(cls, path[:-1]).model_fields)
    close = difflib.get_close_matches(str(path[-1]), known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{key}: unknown key{hint} (known here: {', '.join(known)})"


def _class_at(cls: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    """The settings class that stands at `path` inside `cls`, through lists and optional fields."""
    for part in path:
        if isinstance(part, str) and part in cls.model_fields:
            found = _settings_in(cls.model_fields[part].annotation)
            cls = found or cls
    return cls


def _settings_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _settings_in(arg))), None)
