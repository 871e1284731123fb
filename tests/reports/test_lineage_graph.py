"""The graph of a lineage: where its boxes stand, also for stages that are added later."""

from xml.etree import ElementTree

import pytest

from flows.reports.lineage_graph import Box, draw_lineage, graph, placed
from vectorclm.lineage.chain import Lineage, Node
from vectorclm.stages import BY_NAME, TABLE

CHAT = {
    "sample": [],
    "tokenizer": ["sample"],
    "shards": ["sample", "tokenizer"],
    "chat_shards": ["tokenizer"],
    "pretrain": ["shards"],
    "finetune": ["pretrain", "chat_shards"],
}


def test_no_line_of_the_chain_of_a_chat_model_passes_a_box() -> None:
    assert placed(CHAT) == {
        "sample": (0, 0), "tokenizer": (1, 1), "shards": (0, 2), "chat_shards": (1, 2), "pretrain": (0, 3),
        "finetune": (1, 4),
    }  # fmt: skip


@pytest.mark.parametrize(
    "inputs",
    [
        {row.name: list(row.inputs) for row in TABLE},
        {**CHAT, "preferences": ["tokenizer"], "dpo": ["finetune", "preferences"], "quantize": ["dpo"]},
        {**CHAT, **{f"data {number}": ["tokenizer"] for number in range(5)}},
        {"alone": []},
    ],
)
def test_every_stage_has_a_place_of_its_own_below_its_inputs(inputs: dict[str, list[str]]) -> None:
    places = placed(inputs)
    assert set(places) == set(inputs) and len(set(places.values())) == len(places)
    assert {column for column, _ in places.values()} <= {0, 1}
    assert all(places[name][1] > places[part][1] for name, parts in inputs.items() for part in parts)


def test_boxes_and_arrows_are_those_of_the_lineage() -> None:
    nodes: dict[str, Node] = {}
    for name, parts in CHAT.items():
        nodes[name] = Node(name, name[0] * 64, None, tuple(nodes[part] for part in parts))
    chain = {node.fingerprint + node.stage: node for node in nodes.values()}
    root = ElementTree.fromstring(draw_lineage(Lineage(nodes["finetune"], nodes=chain)))
    shown = [element.text for element in root.iter("text")]
    assert [text for text in shown if text in {BY_NAME[name].result or name for name in CHAT}] == [
        "sample", "tokenizer", "shards", "chat shards", "base model", "chat model"
    ]  # fmt: skip
    arrows = [element for element in root.iter("path") if element.get("class") == "arrow"]
    assert len(arrows) == sum(map(len, CHAT.values())) and root.get("aria-label") == "lineage"


def test_long_lines_are_cut() -> None:
    picture = graph("g", [Box("a", 0, 0, ["x" * 100], [])])
    assert [element.text for element in ElementTree.fromstring(picture).iter("text")] == ["x" * 26 + "…"]
