"""Benchmarks of Prefect and MLflow, and the commands of `vectorclm bench`.

In: an experiment.
Out: rows of a table, with bounds.
"""
