"""Eight users who ask without a pause."""

import os

from locust import HttpUser, task


class Person(HttpUser):
    """Asks a question, and reads the whole answer."""

    @task
    def ask(self) -> None:
        body = {"model": "otter", "messages": [{"role": "user", "content": "Who swims?"}], "temperature": 0}
        headers = {"Authorization": f"Bearer {os.environ['KEY']}"}
        with self.client.post("/v1/chat/completions", json=body, headers=headers, catch_response=True) as response:
            if "otter" not in response.text:
                response.failure(response.text)
