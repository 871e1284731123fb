"""MLflow tracking of curricula and evaluations.

In: artifacts, metrics and their lineage.
Out: runs, data sets, models and versions in the registry.
"""
