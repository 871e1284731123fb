"""Tests of the product, each beside the module that it judges; they assert on artifacts, numbers and behaviour."""

import pytest

pytest.register_assert_rewrite("tests.services", "tests.kill_matrix")
