"""The summary of chat shards, in lines."""

from collections.abc import Mapping
from typing import Any

from vectorclm.corpus.summary import drop_counts
from vectorclm.shards.config import SPLITS


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """One line for each source: the conversations that `write_chat_shards` kept and dropped."""
    lines = []
    for label, source in summary["sources"].items():
        kept = sum(source[split] for split in SPLITS)
        lost = drop_counts(source["dropped"], source["contaminated"])
        read, short = f"{kept:,} of {source['read']:,} conversations kept", f"{source['shortened']:,} shortened"
        of = f", {source['tokens']['train']:,} of {source['tokens']['budget']:,} tokens" if "tokens" in source else ""
        lines.append(f"chat_shards {label}: {read}{of}, {short}; dropped: {lost}")
    return lines
