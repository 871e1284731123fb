"""Benchmarks of each layer against its peers.

In: a machine.
Out: rows of a table, with bounds.
"""
