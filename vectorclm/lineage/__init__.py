"""Where a model comes from.

In: a model or an experiment.
Out: the chain back to the sources, each at its revision.
"""
