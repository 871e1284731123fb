"""Benchmarks of the orchestration and of the tracking.

In: an experiment.
Out: rows of a table, with bounds.
"""
