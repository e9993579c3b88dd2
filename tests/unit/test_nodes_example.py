from __future__ import annotations

from pathlib import Path

import pytest

from testbed.checkpoint.nodes_file import BaseStationSection, NodeSection, load_nodes_file
from testbed.checkpoint.stored_formats import FORMATS

REPOSITORY = Path(__file__).parents[2]
EXAMPLE, DOCS = REPOSITORY / "examples" / "nodes.toml", REPOSITORY / "docs" / "splitting.md"


def test_the_example_is_a_nodes_file_whose_boards_differ() -> None:
    nodes = load_nodes_file(EXAMPLE)
    assert len(nodes.names) == 8
    assert nodes.base_station.memory_gb is not None
    assert nodes.weight_formats("bfloat16").keys() < set(nodes.names)
    assert len({node.memory_gb for node in nodes.nodes}) > 1


@pytest.mark.parametrize("key", [*NodeSection.model_fields, *BaseStationSection.model_fields, "placement"])
def test_every_key_of_a_nodes_file_is_documented(key: str) -> None:
    assert f"`{key}`" in DOCS.read_text() or f"`[{key}]`" in DOCS.read_text()


@pytest.mark.parametrize("key", NodeSection.model_fields)
def test_every_key_of_a_node_stands_in_the_example(key: str) -> None:
    assert f"\n{key} = " in EXAMPLE.read_text()


def test_every_weight_format_is_named_in_example_and_documentation() -> None:
    for weight_format in FORMATS:
        assert weight_format in EXAMPLE.read_text()
        assert f"`{weight_format}`" in DOCS.read_text()
