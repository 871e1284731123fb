"""Operation of the platform: Prefect's server, MLflow, workers, deployments, and their diagnosis.

In: the platform's settings.
Out: running services, and a report of problems.
"""
