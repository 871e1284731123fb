"""The parser of all command lines: options by their whole names, and help texts that may hold a percent sign."""

import argparse
import re
from typing import Any

PLACEHOLDER = re.compile(r"(%\((?:default|prog)\)s|%%)|%")


class HelpFormatter(argparse.HelpFormatter):
    """Fills in `%(default)s` and `%(prog)s`, and prints any other percent sign as it stands, such as of an address."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return PLACEHOLDER.sub(lambda found: found[1] or "%%", action.help) if action.help else action.help


class CommandParser(argparse.ArgumentParser):
    """A parser that takes no beginning of an option for the option; its sub-commands are parsed by the same class."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": HelpFormatter, **options})
