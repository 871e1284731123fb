"""Prefect flows that run the core's stages, and MLflow's record of them."""
