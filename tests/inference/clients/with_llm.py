"""The command line `llm`, with a model of its own file of settings."""

import json
import os
import subprocess
import sys
from pathlib import Path

home = Path(os.environ["LLM_USER_PATH"])
home.mkdir(exist_ok=True)
model = {"model_id": "otter", "model_name": "otter", "api_base": os.environ["BASE_URL"]}
model["api_key_name"] = "vectorclm"
(home / "keys.json").write_text(json.dumps({"vectorclm": os.environ["KEY"]}))
(home / "extra-openai-models.yaml").write_text(json.dumps([model]))
for stream in ([], ["--no-stream"]):
    command = [
        str(Path(sys.executable).with_name("llm")),
        "-m",
        "otter",
        "-o",
        "temperature",
        "0",
        *stream,
        "Who swims?",
    ]
    subprocess.run(command, check=True)
