"""The running platform: Prefect's server, MLflow, workers and deployments.

In: its settings.
Out: services that answer, and a report of what is broken.
"""
