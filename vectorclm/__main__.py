"""`python -m vectorclm STAGE EXPERIMENT`: each stage alone, a model on a text, a chat, a server: the core by itself."""

import gc
import signal
import sys
from collections.abc import Sequence

from vectorclm.command_line import explain, new_app, parse, run
from vectorclm.errors import VectorCLMError
from vectorclm.model_commands import chat, compare, evaluate, export, models, serve
from vectorclm.runtime.preemption import ENDED
from vectorclm.stage_commands import add_stages
from vectorclm.store.commands import store_app
from vectorclm.store.layout import STAGES

MODEL_COMMANDS = (evaluate, export, compare, chat, serve)

app = new_app("python -m vectorclm", "Each stage of an experiment alone, and models: the core by itself.")
add_stages(app, [name for name in STAGES if name not in ("evaluate", "export")], "python -m vectorclm")
app.update(models)
app.command(store_app)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; its exit codes are those of `vectorclm.command_line`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ENDED))  # so that a lease is given back
    try:
        command, bound = parse(app, argv)
    except VectorCLMError as error:
        explain(error)
        return 2
    options = bound.arguments.get("options")
    return run(lambda: command(*bound.args, **bound.kwargs), relay=getattr(options, "relay", False))


if __name__ == "__main__":
    gc.freeze()  # what is imported stays, so no collection of garbage need look at it
    sys.exit(main())
