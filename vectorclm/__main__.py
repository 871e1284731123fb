"""`python -m vectorclm`: the core's command line, without Prefect and MLflow: single stages, models, the store."""

import gc
import signal
import sys
from collections.abc import Sequence

from vectorclm.chaos.chaos_commands import chaos
from vectorclm.command_line import explain, new_app, parse, run
from vectorclm.errors import VectorCLMError
from vectorclm.model_commands import chat, compare, evaluate, export, models, serve
from vectorclm.runtime.preemption import ENDED
from vectorclm.stage_commands import add_stages
from vectorclm.store.commands import store_app
from vectorclm.store.layout import STAGES

MODEL_COMMANDS = (evaluate, export, compare, chat, serve)

app = new_app(
    "python -m vectorclm", "Single stages of an experiment, models and the store, without Prefect and MLflow."
)
ALONE = [name for name in STAGES if name not in {command.__name__ for command in MODEL_COMMANDS}]  # their own commands
add_stages(app, ALONE, "python -m vectorclm")
app.update(models)
app.command(store_app)
app.command(chaos, help_epilogue="Example: python -m vectorclm chaos --store ./store --minutes 10")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; `vectorclm.command_line` lists the exit codes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ENDED))  # a normal exit releases leases
    try:
        command, bound = parse(app, argv)
    except VectorCLMError as error:
        explain(error)
        return 2
    options = bound.arguments.get("options")
    return run(lambda: command(*bound.args, **bound.kwargs), relay=getattr(options, "relay", False))


if __name__ == "__main__":
    gc.freeze()  # imported modules stay, so the garbage collector need not scan them
    sys.exit(main())
