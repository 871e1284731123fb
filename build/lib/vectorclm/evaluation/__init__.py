"""Scores of a model.

In: a model, its tokenizer and tasks.
Out: a score of each item, and figures with standard errors.
"""
