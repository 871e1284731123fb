"""Model lineage: the artifacts and data sources that a model was built from.

In: a model or an experiment.
Out: the chain back to the sources, each at its revision.
"""
