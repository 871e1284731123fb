"""`vectorclm store ls|verify|gc|create`: list a store, verify its bytes, remove leftovers, create a store."""

import json
import sys
import time
from typing import Annotated

from cyclopts import Parameter
from rich.markup import escape

from vectorclm.command_line import Json, StoreOptions, new_app, print_table, table
from vectorclm.store.artifact import Store
from vectorclm.store.gc import OLDER_THAN, YOUNG_SECONDS, discard_folder, find_garbage, remove_garbage, seconds
from vectorclm.store.listing import take_inventory, verify
from vectorclm.store.model_names import existing_store

store_app = new_app("store", "List and verify a store, remove leftovers, create a store.")


@store_app.command(name="ls", help_epilogue="Example: vectorclm store ls --json")
def list_store(*, place: StoreOptions = StoreOptions(), json: Json = False) -> None:
    """List artifacts, checkpoints of trainings in progress, and the processes that build something now."""
    _list(existing_store(place.store), as_json=json)


@store_app.command(name="verify", help_epilogue="Example: vectorclm store verify pretrain")
def verify_store(
    addresses: Annotated[
        tuple[str, ...], Parameter(help="STAGE, STAGE/FINGERPRINT or the beginning of either; all without one")
    ] = (),
    /,
    *,
    place: StoreOptions = StoreOptions(),
    discard: Annotated[
        bool,
        Parameter(
            help="Discard damaged artifacts, so that their stages build them again; `store gc` removes the files"
        ),
    ] = False,
    json: Json = False,
) -> int:
    """Read every byte and compare it with the manifests; exit code 1 if something damaged is left."""
    return _verify(existing_store(place.store), list(addresses), discard=discard, as_json=json)


@store_app.command(name="gc", help_epilogue="Example: vectorclm store gc --older-than 12h --delete")
def collect_garbage(
    *,
    place: StoreOptions = StoreOptions(),
    delete: Annotated[bool, Parameter(help="Remove what is listed")] = False,
    older_than: Annotated[str, Parameter(help="Keep files written within this time, such as 7d or 12h")] = OLDER_THAN,
    json: Json = False,
) -> None:
    """List the leftovers of killed processes; with --delete, remove them."""
    _collect(existing_store(place.store), seconds(older_than), delete=delete, as_json=json)


@store_app.command(name="create", help_epilogue="Example: vectorclm store create --store s3://bucket/prefix")
def create_store(*, place: StoreOptions = StoreOptions()) -> None:
    """Create the bucket of an S3 store, or the folder of a local one."""
    found = Store(place.store)
    found.create()
    print(f"{found.uri} is there")


def _list(store: Store, *, as_json: bool) -> None:
    found = take_inventory(store).as_json()
    if as_json:
        print(json.dumps(found))
        return
    rows = (*found["artifacts"], *found["checkpoints"])
    shown = table("stage", "fingerprint", "size >", "files >", "created (UTC)", "used by")
    for row in rows:
        more = ", ".join(row["used_by"]) if "used_by" in row else f"at step {row['step']:,}"
        made = (row["created"] or "")[:16].replace("T", " ")  # UTC
        place, state = (row["stage"], row["fingerprint"][:12]), made or row["state"]
        shown.add_row(*place, readable_size(row["bytes"]), f"{row['files']:,}", state, escape(more))
    if rows:
        print_table(shown)
    for row in found["leases"]:
        state = "is running" if row["alive"] else "has ended"
        print(f"{row['lease']}: process {row['pid']} on {row['host']} {state}")
    total = sum(row["bytes"] for row in rows)
    print(f"{store.uri}: {len(found['artifacts'])} artifacts, {readable_size(total)}")


def _verify(store: Store, addresses: list[str], *, discard: bool, as_json: bool) -> int:
    folders = wrong = discarded = 0
    for folder, differences in verify(store, addresses):
        folders, wrong = folders + 1, wrong + bool(differences)
        gone = discard and bool(differences) and discard_folder(store, folder)
        discarded += gone
        if as_json:
            row = {"key": folder.key, "files": len(folder.files), "bytes": folder.bytes, "differences": differences}
            print(json.dumps({**row, "discarded": gone} if discard else row), flush=True)
            continue
        print(f"{'!!' if differences else 'ok'} {folder.key} {readable_size(folder.bytes)}", flush=True)
        for difference in differences:
            print(f"   {difference}")
        if discard and differences:
            print("   discarded: its stage builds it again" if gone else "   in use, kept")
    if not as_json:
        print(f"{folders:,} verified, {wrong:,} differ" + (f", {discarded:,} of them discarded" if discard else ""))
    return 1 if wrong > discarded else 0


def _collect(store: Store, older_than: float, *, delete: bool, as_json: bool) -> None:
    limit, every = time.time() - older_than, find_garbage(store, 0)
    found = [item for item in every if item.modified <= limit]
    removed, shown = 0, table("leftover", "size >", "why", "state")
    for item in found:
        gone = delete and remove_garbage(store, item)
        removed += item.bytes if gone else 0
        if as_json:
            print(json.dumps({**item.as_json(), "removed": gone}), flush=True)
        state = "removed" if gone else "in use meanwhile, kept" if delete else "can go"
        shown.add_row(escape(item.what), readable_size(item.bytes), escape(item.why), state)
    if as_json:
        return
    if found:
        print_table(shown)
    if delete:
        print(f"{readable_size(removed)} freed")
    else:
        total = readable_size(sum(item.bytes for item in found))
        print(f"{len(found):,} of them, {total}" + ("; --delete removes them" if found else ""), file=sys.stderr)
    if young := [item for item in every if item.modified > limit]:
        size = readable_size(sum(item.bytes for item in young))
        print(
            f"{len(young):,} younger ones, {size}, stay: --older-than 0s includes them; what a live process uses, and "
            f"what was written in the last {YOUNG_SECONDS} s, always stays",
            file=sys.stderr,
        )


def readable_size(count: float) -> str:
    """A number of bytes in a readable unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
