"""Tests of the product, each beside the module that it judges; they assert on artifacts, numbers and behaviour."""
