"""Parts of a training.

In: a model's parameters and state.
Out: optimizer steps, checkpoints, metrics.
"""
