"""MLflow's pages open on its view for training, without its assistant and notices, until a user chooses otherwise."""

import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

CHOICES: dict[str, str | bool] = {  # what MLflow's pages keep in the browser
    "mlflow.workflowType_v1": "machine_learning",  # not prompts and traces
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": True,  # it covers a quarter of the page; its button opens it
    "mlflow.telemetry.info.alert.dismissed_v1": True,  # a notice that is wrong here: the server sends no usage data
    "_mlflow_model_registry_promo_modal_dismissed_v1": True,  # a window in front of the registered models
}
SCRIPT = (
    f"<script>try{{for(const [key,value] of Object.entries({json.dumps(CHOICES)}))"
    "if(localStorage.getItem(key)===null)localStorage.setItem(key,JSON.stringify(value))}catch(error){}</script>"
).encode()
HEAD = b"<head>"
OF_CONTENT = (b"content-length", b"etag", b"last-modified")  # headers that a changed page makes wrong


class TrainingPages:
    """MLflow's application with a first page that sets CHOICES where the user made none."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/" or scope["method"] != "GET":
            await self.app(scope, receive, send)
            return
        fresh = [item for item in scope["headers"] if not item[0].startswith(b"if-") and item[0] != b"range"]
        start: Message = {}
        page = bytearray()

        async def collect(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            page.extend(message.get("body", b""))
            if not message.get("more_body", False):
                body = bytes(page).replace(HEAD, HEAD + SCRIPT, 1)
                headers = [item for item in start["headers"] if item[0].lower() not in OF_CONTENT]
                headers.append((b"content-length", str(len(body)).encode()))
                await send({**start, "headers": headers})
                await send({"type": "http.response.body", "body": body})

        await self.app({**scope, "headers": fresh}, receive, collect)
