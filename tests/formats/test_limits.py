"""The page of the limits says what the code holds."""

import re
from pathlib import Path

from vectorclm.formats import limits

PAGE = Path(limits.__file__).with_name("README.md").read_text(encoding="utf-8")


def test_the_page_states_every_limit() -> None:
    held = {name: f"{value:,}" for name, value in vars(limits).items() if name.isupper() and name != "MIB"}
    assert len(held) > 30
    assert dict(re.findall(r"^\| `([A-Z_]+)` \| ([\d,]+) \|", PAGE, re.MULTILINE)) == held
