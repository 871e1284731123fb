"""Stages as Prefect tasks.

In: an experiment, a store and a runtime.
Out: the handle of each finished stage, with its progress meanwhile.
"""
