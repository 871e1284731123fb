"""Devices, ranks, signals and progress of a process.

In: runtime settings, torchrun's environment, signals.
Out: a configured torch, collectives over the ranks, progress reports.
"""
