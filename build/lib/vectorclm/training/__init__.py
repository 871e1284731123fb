"""Optimizers, learning-rate schedules, checkpoints and metrics of a training run.

In: a model's parameters and state.
Out: optimizer steps, learning rates, checkpoints, metrics.
"""
