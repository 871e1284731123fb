"""Files of settings in TOML or JSON: size, depth and the parts of keys are checked before they are parsed."""

import re
import tomllib
from pathlib import Path
from typing import Any

from vectorclm.errors import ConfigError
from vectorclm.formats.files import read_bytes, size_of
from vectorclm.formats.json_files import parse_json
from vectorclm.formats.limits import DEPTH, KEY_PARTS, SETTINGS_BYTES, SETTINGS_VALUES

# Texts and comments. A text may lack its end, so that no place is read twice.
TEXT = re.compile(
    r'"{3}(?:[^\\"]|\\.|"(?!""))*+(?:"{3,5}|\\?\Z)'
    r"|'{3}(?:[^']|'(?!''))*+(?:'{3,5}|\Z)"
    r'|"(?:[^"\\\n]|\\.)*+"?'
    r"|'[^'\n]*+'?"
    r"|#[^\n]*+",
    re.DOTALL,
)


def check_toml(text: str) -> None:
    """Raise ValueError where a text of TOML is deeper, or has more values or parts of a key, than allowed."""
    plain = TEXT.sub("_", text)
    if any(part.count(".") >= KEY_PARTS for part in re.split(r"[=\n,{}\[\]]", plain)):
        raise ValueError(f"a key has more than {KEY_PARTS} parts")
    level = 0
    values = plain.count("=") + plain.count(",")
    if values > SETTINGS_VALUES:
        raise ValueError(f"it has more than {SETTINGS_VALUES:,} values")
    for match in re.finditer(r"[\[\]{}]", plain):
        level = max(0, level + (1 if match[0] in "[{" else -1))
        if level > DEPTH:
            raise ValueError(f"its lists and tables are more than {DEPTH} deep")


def parse_toml(text: str) -> dict[str, Any]:
    """The table of a text of TOML. Raises ValueError with the reason."""
    check_toml(text)
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("its lists and tables are too deep") from None


def read_settings_file(path: Path) -> dict[str, Any]:
    """The table of a TOML or JSON file. Raises ConfigError with the place of a fault, or where it is too large."""
    if (size := size_of(path, "a file of settings", ConfigError)) > SETTINGS_BYTES:
        raise ConfigError(
            f"{path} has {size:,} bytes, and a file of settings at most {SETTINGS_BYTES:,}: name files by a pattern "
            "such as texts/*.jsonl"
        )
    data = read_bytes(path, SETTINGS_BYTES, "a file of settings", ConfigError)
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
        values = parse_json(text) if path.suffix == ".json" else parse_toml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a table of settings, found {type(values).__name__}")
    return values
