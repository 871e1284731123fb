"""MLflow's pages open on its view for training, without its assistant and notices, until a user chooses otherwise."""

import json

from starlette.types import ASGIApp

from flows.platform.page_script import PageScript

CHOICES: dict[str, str | bool] = {  # what MLflow's pages keep in the browser
    "mlflow.workflowType_v1": "machine_learning",  # not prompts and traces
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": True,  # it covers a quarter of the page; its button opens it
    "mlflow.telemetry.info.alert.dismissed_v1": True,  # a notice that is wrong here: the server sends no usage data
    "_mlflow_model_registry_promo_modal_dismissed_v1": True,  # a window in front of the registered models
}
SCRIPT = (
    f"for(const [key,value] of Object.entries({json.dumps(CHOICES)}))"
    "if(localStorage.getItem(key)===null)localStorage.setItem(key,JSON.stringify(value))"
)


def training_pages(app: ASGIApp) -> ASGIApp:
    """MLflow's application with a first page that sets CHOICES where the user made none."""
    return PageScript(app, SCRIPT, lambda path: path == "/")
