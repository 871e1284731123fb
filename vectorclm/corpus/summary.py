"""The summary of a sample, in lines: documents drawn and dropped."""

from collections.abc import Mapping
from typing import Any


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """One line for each source: the documents that `write_sample` drew and dropped."""
    lines = []
    for label, source in summary["sources"].items():
        drawn = source["documents"] + source["validation_documents"]
        lost = drop_counts(source["dropped"], source["contaminated"])
        lines.append(f"sample {label}: {drawn:,} of {source['read']:,} documents drawn; dropped: {lost}")
    return lines


def drop_counts(dropped: Mapping[str, int], contaminated: Mapping[str, int]) -> str:
    """Format drop counts by reason, with the benchmarks that were found in brackets."""
    counts = [f"{count:,} {reason.replace('_', ' ')}" for reason, count in sorted(dropped.items()) if count]
    tasks = ", ".join(f"{label} {count:,}" for label, count in sorted(contaminated.items()))
    return (", ".join(counts) or "none") + (f" ({tasks})" if tasks else "")
