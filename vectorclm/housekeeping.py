"""`vectorclm store ls|verify|gc|create`: look into a store, prove its bytes, and free what nothing needs."""

import argparse
import json
import sys
from typing import Any

from vectorclm.artifact import Store, default_store
from vectorclm.garbage import OLDER_THAN, discard_folder, find_garbage, remove_garbage, seconds
from vectorclm.inventory import take_inventory, verify

ACTIONS = {
    "ls": "list artifacts, checkpoints of trainings in progress, and who makes what at this moment",
    "verify": "read every byte and compare it with the manifests; 1 where something differs",
    "gc": "list what processes that were killed have left behind, and with --delete remove it",
    "create": "make the bucket of an S3 store",
}


def add_store_command(commands: Any) -> None:
    """Add `store` to the subparsers of a command line."""
    parser = commands.add_parser("store", help="look into the store, verify it, remove what nothing needs")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    default = default_store()
    for action, about in ACTIONS.items():
        parser = actions.add_parser(action, help=about, description=about)
        parser.add_argument("--store", default=default, metavar="URI", help="where artifacts are kept (%(default)s)")
        if action != "create":
            parser.add_argument("--json", action="store_true", help="print JSON: of ls one object, else one a line")
        if action == "verify":
            about = "STAGE, STAGE/FINGERPRINT or the beginning of either; all without one"
            parser.add_argument("addresses", nargs="*", metavar="ADDRESS", help=about)
            about = "give up what differs, so that its stage makes it again; its files stay until `store gc` takes them"
            parser.add_argument("--discard", action="store_true", help=about)
        if action == "gc":
            parser.add_argument("--delete", action="store_true", help="remove what is listed")
            about = "spare what was written since then, such as 7d or 12h (%(default)s)"
            parser.add_argument("--older-than", default=OLDER_THAN, metavar="AGE", help=about)


def run_store_command(args: argparse.Namespace) -> int:
    """Run one of them; 1 where `verify` found a difference, else 0."""
    store = Store(args.store)
    if args.action != "create":
        store.check_reachable()
    match args.action:
        case "ls":
            _list(store, as_json=args.json)
        case "verify":
            return _verify(store, args.addresses, discard=args.discard, as_json=args.json)
        case "gc":
            _collect(store, seconds(args.older_than), delete=args.delete, as_json=args.json)
        case _:
            store.create()
            print(f"{store.uri} is there")
    return 0


def _list(store: Store, *, as_json: bool) -> None:
    found = take_inventory(store).as_json()
    if as_json:
        print(json.dumps(found))
        return
    for row in (*found["artifacts"], *found["checkpoints"]):
        more = ", ".join(row["used_by"]) if "used_by" in row else f"at step {row['step']:,}"
        place, told = f"{row['stage']:<13} {row['fingerprint'][:12]}", row["created"] or row["state"]
        print(f"{place} {_size(row['bytes']):>9} {row['files']:>5} files  {told:<25} {more}".rstrip())
    for row in found["leases"]:
        told = "is at work" if row["alive"] else "has ended"
        print(f"{row['lease']}: process {row['pid']} on {row['host']} {told}")
    total = sum(row["bytes"] for row in (*found["artifacts"], *found["checkpoints"]))
    print(f"{store.uri}: {len(found['artifacts'])} artifacts, {_size(total)}")


def _verify(store: Store, addresses: list[str], *, discard: bool, as_json: bool) -> int:
    folders = wrong = 0
    for folder, differences in verify(store, addresses):
        folders, wrong = folders + 1, wrong + bool(differences)
        gone = discard and bool(differences) and discard_folder(store, folder)
        if as_json:
            row = {"key": folder.key, "files": len(folder.files), "bytes": folder.bytes, "differences": differences}
            print(json.dumps({**row, "discarded": gone} if discard else row), flush=True)
            continue
        print(f"{'!!' if differences else 'ok'} {folder.key} {_size(folder.bytes)}", flush=True)
        for difference in differences:
            print(f"   {difference}")
        if discard and differences:
            print("   given up: its stage makes it again" if gone else "   in use, kept")
    if not as_json:
        print(f"{folders:,} verified, {wrong:,} differ")
    return 1 if wrong else 0


def _collect(store: Store, older_than: float, *, delete: bool, as_json: bool) -> None:
    found = find_garbage(store, older_than)
    removed = 0
    for item in found:
        gone = delete and remove_garbage(store, item)
        removed += item.bytes if gone else 0
        if as_json:
            print(json.dumps({**item.as_json(), "removed": gone}), flush=True)
        else:
            told = "removed" if gone else "in use meanwhile, kept" if delete else "can go"
            print(f"{told}: {item.what} {_size(item.bytes)} ({item.why})", flush=True)
    if as_json:
        return
    if delete:
        print(f"{_size(removed)} freed")
    else:
        total = _size(sum(item.bytes for item in found))
        print(f"{len(found):,} of them, {total}" + ("; --delete removes them" if found else ""), file=sys.stderr)


def _size(count: float) -> str:
    """A number of bytes in the unit that fits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
