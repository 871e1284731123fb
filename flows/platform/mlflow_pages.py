"""MLflow's pages open on its view for training, not on the one for prompts and traces, until a user chooses."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

CHOICE = "mlflow.workflowType_v1"  # where MLflow's pages keep the user's choice in the browser
SCRIPT = (
    f'<script>try{{if(!localStorage.getItem("{CHOICE}"))'
    f'localStorage.setItem("{CHOICE}",\'"machine_learning"\')}}catch(error){{}}</script>'
).encode()
HEAD = b"<head>"
OF_CONTENT = (b"content-length", b"etag", b"last-modified")  # headers that a changed page makes wrong


class TrainingPages:
    """MLflow's application with a first page that sets the view for training where no view was chosen."""

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
