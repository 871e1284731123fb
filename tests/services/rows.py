"""Count the records that a client reads from Prefect's server, as what is read often must not grow with old runs."""

from collections.abc import Callable

import httpx
from prefect.client.orchestration import SyncPrefectClient


def rows_read(client: SyncPrefectClient, action: Callable[[], object]) -> int:
    """The number of records in the lists that the server answers while `action` runs."""
    counted: list[int] = []

    def count(response: httpx.Response) -> None:
        response.read()
        found = response.json() if response.content else None
        counted.append(len(found) if isinstance(found, list) else 0)

    hooks = client._client.event_hooks
    client._client.event_hooks = {**hooks, "response": [*hooks.get("response", []), count]}
    try:
        action()
    finally:
        client._client.event_hooks = hooks
    assert counted, "nothing was asked"
    return sum(counted)
