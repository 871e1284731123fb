"""`python -m vectorclm STAGE EXPERIMENT`: each stage alone, a model on a text, and a chat. The core by itself."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from vectorclm import progress
from vectorclm.artifact import Store
from vectorclm.config import load_experiment, read_config
from vectorclm.errors import DataError, VectorCLMError
from vectorclm.evaluate import text_scores
from vectorclm.generate import chat
from vectorclm.model import CausalLM
from vectorclm.pinning import pin
from vectorclm.runtime import Runtime
from vectorclm.settings import validate
from vectorclm.stages import STAGES, run_stage
from vectorclm.train_tokenizer import load_tokenizer

ABOUT = {
    "sample": "draw the documents and write them as Parquet",
    "tokenizer": "learn the byte-level BPE",
    "shards": "tokenize the documents into windows",
    "chat_shards": "render and pack the conversations",
    "pretrain": "train the base model over the curriculum",
    "evaluate_base": "score the base model",
    "finetune": "tune the base model on the conversations",
    "evaluate": "score the chat model; or, with --text, any model on any text",
    "export": "write the models as Hugging Face directories with their cards",
}


def add_place(parser: argparse.ArgumentParser) -> None:
    """The options that say where artifacts and sources are."""
    default = os.environ.get("VECTORCLM_STORE", "./store")
    parser.add_argument("--store", default=default, metavar="URI", help="where artifacts are kept (%(default)s)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="read every source from this local mirror")
    parser.add_argument("--runtime", type=Path, metavar="FILE", help="TOML or JSON with settings of this machine")


def add_commands(commands: Any) -> None:
    """Add the core's commands to the subparsers of a command line."""
    for stage in STAGES:
        parser = commands.add_parser(stage, help=ABOUT[stage])
        what = "experiment (tiny, small, base, or a TOML file)"
        parser.add_argument("target", metavar="EXPERIMENT", help=what + (" or model" if stage == "evaluate" else ""))
        add_place(parser)
        parser.add_argument(
            "--relay",
            action="store_true",
            help="report progress and errors as JSON lines to a parent process",
        )
        if stage == "evaluate":
            parser.add_argument(
                "--text",
                type=Path,
                metavar="FILE",
                help="score the model directory EXPERIMENT on this UTF-8 text",
            )
            parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser = commands.add_parser("chat", help="talk to a model in the terminal")
    parser.add_argument("target", type=Path, metavar="MODEL", help="model directory")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token (%(default)s)")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="draw from this much of the probability (%(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (%(default)s)")


def load_runtime(path: Path | None) -> Runtime:
    """The runtime settings in a file, or the defaults."""
    return Runtime() if path is None else validate(Runtime, read_config(path), str(path))


def run_command(args: argparse.Namespace) -> None:
    """Run one of the core's commands. Raises VectorCLMError with what to do where it cannot."""
    if args.command == "chat":
        model, tokenizer = CausalLM.from_pretrained(args.target), load_tokenizer(args.target)
        chat(model, tokenizer, args.temperature, args.top_p, args.max_new_tokens)
    elif args.command == "evaluate" and args.text is not None:
        score_text(Path(args.target), args.text, as_json=args.json)
    else:
        make_stage(args)


def score_text(directory: Path, file: Path, *, as_json: bool) -> None:
    """Print a model's bits per byte on a text."""
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8: byte {error.start} cannot be read; convert the file first") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    device = Runtime().configure_torch()
    model, tokenizer = CausalLM.from_pretrained(directory).to(device), load_tokenizer(directory)
    scores = text_scores(model, tokenizer, text, device)
    if as_json:
        print(json.dumps(scores))
    else:
        print(
            f"{scores['bits_per_byte']:.4f} bits per byte, {scores['nats_per_token']:.4f} nats per token",
            end=" ",
        )
        print(f"({scores['bytes']:,} bytes, {scores['tokens']:,} tokens)")


def make_stage(args: argparse.Namespace) -> None:
    """Make one stage's artifact and print where it is."""
    experiment, path = load_experiment(args.target)
    store, runtime = Store(args.store), load_runtime(args.runtime)
    if not args.relay:  # a parent has done both before any stage began
        store.check_writable()
        experiment, notes = pin(experiment, path, args.data, resolve=True)
        for note in notes:
            print(note, file=sys.stderr)
    show: AbstractContextManager[None] = progress.json_lines() if args.relay else progress.bars()
    with show:
        artifact, reused = run_stage(args.command, experiment, store, runtime, args.data)
    if not args.relay:
        print(f"{args.command} {'reused' if reused else 'built'}: {artifact.uri}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 where all went well, 2 for an error that its message explains."""
    parser = argparse.ArgumentParser("python -m vectorclm", description=__doc__)
    add_commands(parser.add_subparsers(dest="command", required=True, metavar="COMMAND"))
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a lease is given back
    try:
        run_command(args)
    except VectorCLMError as error:
        if getattr(args, "relay", False):
            print(json.dumps({"error": {"type": type(error).__name__, "message": str(error)}}), flush=True)
        else:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
