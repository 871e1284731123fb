"""A stage as a Prefect task.

In: an experiment, a store and a runtime.
Out: a finished stage's handle, with its progress on the way.
"""
