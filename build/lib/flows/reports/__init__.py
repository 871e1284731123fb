"""Reports about a model for a person.

In: an artifact with its lineage, or an experiment.
Out: an HTML page, a summary, a lineage tree, an estimate of costs.
"""
