"""The order of the tests: those that take longest begin."""

from pathlib import Path

import pytest

# The files that take minutes, the longest first: they wait more than they compute, so others fill their time.
LONGEST = (
    "platform/test_platform.py",
    "platform/test_database.py",
    "platform/test_provision.py",
    "test_tiny.py",
    "test_curriculum.py",
    "shards/test_block_readers.py",
    "platform/test_doctor.py",
    "store/test_storage.py",
    "training/test_checkpoint.py",
    "runtime/test_preemption.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that none of them runs alone at the end."""
    order = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
