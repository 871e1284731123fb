"""What a person reads about a model.

In: an artifact with its lineage.
Out: a page, a summary, a tree, an estimate of costs.
"""
