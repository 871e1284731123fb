"""Create what a worker needs before it starts: the bucket, and Prefect's pools, automations and deployments."""

import sys

from prefect.client.orchestration import get_client

from flows.platform.config import read_platform
from flows.platform.provision import provision
from vectorclm.store.artifact import Store

config = read_platform(None)
store = Store(config.vectorclm_store)
store.create()
store.check_writable()
with get_client(sync_client=True) as client:
    if (problem := provision(client, print, config)) is not None:
        sys.stderr.write(f"{problem}\n")
