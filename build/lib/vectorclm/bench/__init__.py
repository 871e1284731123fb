"""Benchmarks of each part against other libraries that do the same.

In: a machine.
Out: rows of a table, each with a bound.
"""
