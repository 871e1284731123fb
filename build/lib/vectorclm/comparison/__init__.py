"""Comparisons of measured models.

In: scores of two models, or of a training's checkpoints.
Out: differences with intervals, or curves.
"""
