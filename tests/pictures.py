"""Take the pictures of the pages anew: a real platform with a store of its own, `tiny` in each story, and Chromium.

`python -m tests.pictures [TOKENS]` writes into infra/pictures; it takes ten minutes on two idle cores. TOKENS, at least
100,000, is a smaller budget of pretraining for a busy machine. Names of the machine and
its user are replaced before a picture is taken. Its runs also show how long each step of an operator takes.
"""

import getpass
import io
import re
import shutil
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import psutil
from mlflow import MlflowClient
from PIL import Image
from prefect.client.schemas.filters import ArtifactFilter
from prefect.client.schemas.objects import FlowRun
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver

from tests.conftest import chromium
from tests.services.browser import by_text, click, fill, log_in, says
from tests.services.platform import Platform, platform_at, until
from tests.services.trigger import on_platform
from vectorclm.config import load_experiment

FOLDER = Path(__file__).parent.parent / "infra" / "pictures"
DEMO = Path(tempfile.gettempdir()) / "demo"  # the pages show this path
WIDTH, NARROW = 1200, 400  # of a window, and of a telephone's
COLOURS = 128  # of a picture: these pages have few
PHASES = load_experiment("tiny")[0].pretrain.phases
TOKENS = sum(phase.tokens for phase in PHASES)
BUSY = 3600  # seconds that a run of `tiny` may take on a busy machine
SETTLES = 4.0  # seconds until what moves on a page has its place
ALIAS = "vectorclm-chat@candidate"
RENAME = """
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode())
  for (const [name, other] of arguments[0]) {
    const changed = walker.currentNode.data.replace(new RegExp(`(?<![\\\\w/])${name}(?!\\\\w)`, 'g'), other);
    if (changed !== walker.currentNode.data) walker.currentNode.data = changed;
  }
document.activeElement?.blur();
"""


@dataclass
class Camera:
    """A browser at the pages of a platform, whose pictures become files."""

    platform: Platform
    window: WebDriver
    tokens: int  # of the pretraining

    def look(self, page: str, height: int, shown: str, width: int = WIDTH) -> None:
        """Open a page in a window of this size and wait until it says `shown`."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.window.get("about:blank")  # else a page that differs behind its # would not load anew
        self.window.get(page)
        until(lambda: says(self.window, shown), f"{page} says {shown!r}", 120)

    def take(self, name: str, settles: float = SETTLES) -> None:
        """Save what the window shows as a small file, without the names of the machine and its user."""
        time.sleep(settles)
        users = {getpass.getuser(), psutil.Process().username()}
        names = [(socket.gethostname(), "laptop"), *((user, "researcher") for user in users)]
        self.window.execute_script(RENAME, [(re.escape(name), other) for name, other in names])
        picture = Image.open(io.BytesIO(self.window.get_screenshot_as_png())).convert("RGB")
        picture.quantize(COLOURS).save(FOLDER / f"{name}.png", optimize=True)
        print(f"{name}.png: {(FOLDER / f'{name}.png').stat().st_size:,} bytes", flush=True)
        self.window.get("about:blank")  # a drawn graph keeps a core busy

    def scroll_to(self, text: str, tag: str = "span") -> None:
        (element, *_) = until(lambda: by_text(self.window, tag, text), f"{text!r} is there", 60)
        self.window.execute_script("arguments[0].scrollIntoView({block: 'start'})", element)

    def page_of_run(self, run_id: UUID) -> str:
        return f"{self.platform.config.prefect_url}/runs/flow-run/{run_id}"

    def page_of_artifact(self, key: str) -> str:
        """The page of the newest artifact with this key."""
        wanted = ArtifactFilter.model_validate({"key": {"any_": [key]}})
        found = self.platform.client.read_artifacts(artifact_filter=wanted)
        newest = max(found, key=lambda artifact: str(artifact.created))
        return f"{self.platform.config.prefect_url}/artifacts/artifact/{newest.id}"


def form_refuses_and_starts(camera: Camera) -> UUID:
    """Fill the form of `tiny`: it refuses a value, then starts a run, in whose third stage the disk is broken."""
    platform, window = camera.platform, camera.window
    deployment = platform.client.read_deployment_by_name("curriculum/tiny")
    page = f"{platform.config.prefect_url}/deployments/deployment/{deployment.id}/run"
    window.get(page)
    log_in(window, platform)
    camera.look(page, 1000, "Token budget")
    fill(window, "Pretraining", "Token budget", "5")
    fill(window, "Fine-tuning", "Epochs", "0.2")
    click(window, "button", "Submit")
    until(lambda: says(window, "5 is less than the minimum of 1000"), "the form refuses", 60)
    camera.scroll_to("Pretraining")
    camera.take("form", settles=1)  # the message goes away
    camera.look(page, 1000, "Token budget")
    if camera.tokens != TOKENS:
        fill(window, "Pretraining", "Token budget", str(camera.tokens))
    fill(window, "Fine-tuning", "Epochs", "0.2")

    def started() -> list[FlowRun]:
        """The run; Submit is pressed again where the page lost it."""
        if not (found := platform.client.read_flow_runs()) and window.current_url.endswith("/run"):
            click(window, "button", "Submit")
        return found

    return until(started, "the run is there", 120)[0].id


def retry(camera: Camera, run_id: UUID) -> None:
    """Press Retry, and take the run while it trains."""
    platform, window = camera.platform, camera.window
    camera.look(camera.page_of_run(run_id), 1000, "Failed")
    click(window, "button", "Retry")
    until(lambda: len(by_text(window, "button", "Retry")) > 1, "it asks whether to retry", 60)
    window.execute_script("arguments[0].click()", by_text(window, "button", "Retry")[-1])
    until(lambda: platform.run(run_id).run_count == 2, "the run starts again", 120)
    shown = r"Samples at step [1-9]" if camera.tokens == TOKENS else r"Loss of pretrain so far"
    until(lambda: re.search(shown, platform.overview(run_id)), "the training has losses and samples", BUSY)
    camera.look(camera.page_of_run(run_id), 1000, "pretrain")
    click(window, "*[not(*)]", "Artifacts")
    until(lambda: says(window, "renewed every few seconds"), "the artifacts are shown", 60)
    camera.take("graph")
    camera.look(camera.page_of_artifact("overview"), 1000, "Loss of pretrain so far")
    camera.take("overview")


def ended(platform: Platform, run_id: UUID) -> str:
    """The name of the state in which a run of `tiny` ends."""
    return until(lambda: _final(platform.run(run_id)), f"run {run_id} ends", BUSY)


def _final(run: FlowRun) -> str:
    return run.state.name or "" if run.state is not None and run.state.is_final() else ""


def command_line(camera: Camera, *options: str) -> UUID:
    """Start `tiny` from the command line; returns the id of the run."""
    if camera.tokens != TOKENS:
        shares = [phase.tokens * camera.tokens // TOKENS for phase in PHASES]
        settings = [f"--set=pretrain.phases.{number}.tokens={tokens}" for number, tokens in enumerate(shares)]
        options = (*options, *settings)
    done = on_platform(camera.platform, "tiny", *options)
    assert done.returncode == 0, done.stderr
    return UUID(done.stdout.strip().rpartition("/")[2])


def evaluate(platform: Platform) -> None:
    """Score the candidate as its schedule does."""
    deployment = platform.client.read_deployment_by_name("evaluate/evaluate")
    values = {"model": f"models:/{ALIAS}", "suite": "tiny"}
    run = platform.client.create_flow_run_from_deployment(deployment.id, parameters=values)
    assert ended(platform, run.id) == "Completed"


def schedule(camera: Camera) -> UUID:
    """Set a schedule, and score three candidates as it does; returns the run of the last one."""
    platform, prefect = camera.platform, camera.platform.config.prefect_url
    evaluate(platform)
    second, third = (command_line(camera, f"--set=finetune.epochs={epochs}") for epochs in (0.4, 0.8))
    until(lambda: platform.run(second).state_name == "Running", "the second runs", BUSY)
    until(lambda: platform.run(third).state_name == "Queued", "the third waits", BUSY)
    camera.look(f"{prefect}/runs", 1200, "Queued")
    camera.take("queue")
    assert ended(platform, second) == "Completed"
    evaluate(platform)
    assert ended(platform, third) == "Completed"
    evaluate(platform)
    done = platform.command("schedule", "evaluate", ALIAS, "--suite", "tiny", "--cron", "@daily")
    assert done.returncode == 0, done.stderr
    deployment = platform.client.read_deployment_by_name("evaluate/evaluate")
    camera.look(f"{prefect}/deployments/deployment/{deployment.id}", 700, f"{ALIAS} on tiny")
    camera.take("schedule")
    camera.look(camera.page_of_artifact("scores-vectorclm-chat-candidate-tiny"), 1000, "on tiny")
    camera.take("scores")
    return third


def trace(camera: Camera, run_id: UUID) -> None:
    """MLflow's pages of the runs, a training, and the candidate; the report on a screen and on a telephone."""
    url, window = camera.platform.config.mlflow_url, camera.window
    client = MlflowClient(url)
    version = client.get_model_version_by_alias("vectorclm-chat", "candidate")
    found = client.get_experiment_by_name("tiny")
    assert found is not None
    place = f"{url}/#/experiments/{found.experiment_id}/runs"
    camera.look(place, 700, "matching runs")
    opens = "button[data-component-id*='runnamecellrenderer']"  # the plus sign before a curriculum
    until(lambda: window.find_elements(By.CSS_SELECTOR, opens), "a run with stages", 60)[0].click()
    until(lambda: says(window, "pretrain "), "the stages are shown", 60)
    camera.take("runs")
    (training, *_) = client.search_runs([found.experiment_id], "tags.stage = 'pretrain' and tags.state = 'built'")
    camera.look(f"{place}/{training.info.run_id}/model-metrics", 1000, "final_validation")
    click(window, "*[not(*)]", "final_validation")  # closed, so that the curves are in sight
    camera.take("curves")
    camera.look(f"{url}/#/models/vectorclm-chat/versions/{version.version}", 900, "what it holds")
    camera.take("version")
    (report,) = re.findall(r"\[report\]\(\S+/reports/(\S+?)\)", camera.platform.overview(run_id))
    for name, width, height in (("report", WIDTH, 1000), ("report-narrow", NARROW, 1200)):
        camera.look((camera.platform.config.home / "reports" / report).as_uri(), height, "chat model", width)
        camera.take(name)


def stories(camera: Camera) -> None:
    platform = camera.platform
    broken = Path(platform.config.vectorclm_store) / "shards"
    broken.write_text("a file where a folder must be: the stage cannot write its artifact")
    run_id = form_refuses_and_starts(camera)
    assert ended(platform, run_id) == "Failed"
    broken.unlink()
    retry(camera, run_id)
    assert ended(platform, run_id) == "Completed"
    camera.look(camera.page_of_run(run_id), 1000, "Completed")
    until(lambda: all(says(camera.window, name) for name in ("pretrain", "finetune", "export")), "the graph", 60)
    camera.take("retried")
    trace(camera, schedule(camera))


def main() -> None:
    if DEMO.exists():
        sys.exit(f"{DEMO} is in the way: the pictures show a store there, which is removed in the end")
    DEMO.mkdir()
    try:
        with platform_at(DEMO / "store") as platform:
            window = chromium(WIDTH, 1000)
            try:
                stories(Camera(platform, window, int(sys.argv[1]) if sys.argv[1:] else TOKENS))
            finally:
                window.quit()
    finally:
        shutil.rmtree(DEMO)


if __name__ == "__main__":
    main()
