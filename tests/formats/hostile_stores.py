"""Hostile manifests, addresses, scores, checkpoints, records and requests."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tests.formats.samples import DEEP, case, write_header
from vectorclm.comparison.curves import curves_of
from vectorclm.evaluation.item_scores import read_scored
from vectorclm.inference.openai_format import json_object
from vectorclm.lineage.chain import lineage
from vectorclm.store.artifact import StageSpec, Store
from vectorclm.store.manifest import sealed
from vectorclm.store.model_ref import find_model
from vectorclm.training.checkpoint import Checkpoints


@case
def manifest_of_nested_json(folder: Path) -> Any:
    return look_up(folder, DEEP.encode())


@case
def manifest_that_is_a_list(folder: Path) -> Any:
    return look_up(folder, b"[]")


@case
def manifest_with_nul_in_a_name(folder: Path) -> Any:
    files = {"a\0b": {"bytes": 1, "sha256": "0" * 64}}
    return look_up(folder, sealed({"files": files, "inputs": {}})).verify()


@case
def manifest_with_half_a_surrogate(folder: Path) -> Any:
    text = '{"files": {"\\ud800": {"bytes": 1, "sha256": "' + "0" * 64 + '"}}, "inputs": {}}'
    return look_up(folder, text.encode()).verify()


@case
def manifest_with_a_size_of_text(folder: Path) -> Any:
    files = {"a": {"bytes": True, "sha256": "x"}, "b": {"bytes": -1, "sha256": "0" * 64}}
    return look_up(folder, sealed({"files": files, "inputs": []})).verify()


def look_up(folder: Path, data: bytes) -> Any:
    place = folder / "tokenizer" / ("0" * 64)
    place.mkdir(parents=True)
    (place / "manifest.json").write_bytes(data)
    return Store(str(folder)).look_up("tokenizer", "0" * 64)


@case
def manifests_in_a_chain_of_2_000(folder: Path) -> Any:
    for number in range(2000):
        inputs = {"sample": f"{number + 1:064}"} if number < 1999 else {}
        place = folder / "sample" / f"{number:064}"
        place.mkdir(parents=True)
        head = {"stage": "sample", "fingerprint": f"{number:064}", "format_version": 1, "files": {}, "inputs": inputs}
        more = {"config": {"sources": []}, "summary": {"sources": {}}, "environment": {}, "created": "2026"}
        (place / "manifest.json").write_bytes(sealed({**head, **more}))
    return lineage(str(folder / "sample" / f"{0:064}"), Store(str(folder)))


@case
def address_with_nul(folder: Path) -> Any:
    return find_model(f"{folder}/a\0b")


@case
def address_with_half_a_surrogate(folder: Path) -> Any:
    return find_model("s3://x\ud800/finetune/" + "0" * 64)


@case
def address_of_a_store_with_half_a_surrogate(folder: Path) -> Any:
    return Store(f"{folder}/\ud800x").look_up("finetune", "0" * 64)


@case
def items_of_wrong_types(folder: Path) -> Any:
    pq.write_table(pa.table({"task": [1], "item": [2], "log_likelihoods": ["x"]}), folder / "items.parquet")
    pq.write_table(pa.table({"source": [None]}), folder / "texts.parquet")
    return read_scored(folder)


@case
def items_that_are_no_parquet(folder: Path) -> Any:
    (folder / "items.parquet").write_bytes(b"PAR1" + b"\0" * 100)
    return read_scored(folder)


@case
def checkpoint_of_wrong_types(folder: Path) -> Any:
    store, spec = Store(str(folder)), StageSpec("pretrain", 1, {}, {})
    work = folder / "new"
    work.mkdir()
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    write_header(work / "model.safetensors", {"a": entry}, b"1234")
    write_header(work / "optim.safetensors", {"not.a.number.at.all": entry}, b"1234")
    (work / "metrics.jsonl").write_text("[1]\nnull\n")
    head = {"step": "first", "order": "o", "data": "d"}
    store.publish_directory(f"checkpoints/{spec.fingerprint}/step-00000001-00000000", work, head)
    with Checkpoints(store, spec, folder / "work", "d") as found:
        saved = found.latest("o")
    if saved is not None:
        from vectorclm.training.checkpoint import restore

        restore(saved, torch.nn.Linear(1, 1), [])
    return saved


@case
def curves_of_wrong_types(folder: Path) -> Any:
    store, spec = Store(str(folder)), StageSpec("pretrain", 1, {}, {})
    work = folder / "new"
    work.mkdir()
    found = store.publish(spec, work, {})
    (folder / "curves").mkdir()
    pq.write_table(pa.table({"stage": [[1]], "step": ["x"]}), folder / "curves" / "a-0.parquet")
    return curves_of(found)


@case
def report_of_nested_metrics(folder: Path) -> Any:
    from flows.reports.report import lines_of

    store, spec = Store(str(folder)), StageSpec("pretrain", 1, {}, {})
    work = folder / "new"
    work.mkdir()
    (work / "metrics.jsonl").write_text(DEEP + "\n")
    return lines_of(store.publish(spec, work, {}))


@case
def report_of_cut_metrics(folder: Path) -> Any:
    from flows.reports.report import lines_of

    store, spec = Store(str(folder)), StageSpec("pretrain", 1, {}, {})
    work = folder / "new"
    work.mkdir()
    (work / "metrics.jsonl").write_text('{"step": 1\n3\n')
    return lines_of(store.publish(spec, work, {}))


@case
def request_of_nested_json(folder: Path) -> Any:
    return json_object(DEEP.encode())


@case
def request_with_half_a_surrogate(folder: Path) -> Any:
    return json_object(b'{"a": "\xff"}')
