"""The curriculum as a Prefect flow, tracked in MLflow. The core, `vectorclm`, knows neither."""
