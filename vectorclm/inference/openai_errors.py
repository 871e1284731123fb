"""Errors of OpenAI's API: refused requests, and their JSON responses."""

import json
from typing import Any

from starlette.responses import JSONResponse

KINDS = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class Refusal(Exception):
    """A refused request, with the fields of an error of the API."""

    def __init__(self, message: str, status: int = 400, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The JSON body of the error."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> "ErrorResponse":
        """The HTTP response; it closes the connection where a part of the request's body is still unread."""
        headers = {"Connection": "close"} if self.status in (408, 413) else {}
        headers["X-Content-Type-Options"] = "nosniff"
        return ErrorResponse(self.body(), self.status, headers)


class ErrorResponse(JSONResponse):
    """A JSON response in ASCII: a message can quote text of the request that UTF-8 cannot express."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode("ascii")


def explain(error: Exception) -> Refusal:
    """The API's error for any exception."""
    return error if isinstance(error, Refusal) else Refusal("the server failed; its log has the reason", 500)
