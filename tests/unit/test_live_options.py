"""What commands on a live model are told: a policy, and prompts in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.config import RunConfig
from testbed.errors import ConfigError
from testbed.live.options import policy_words, read_prompts, with_policies, with_policy


def config(**more: object) -> RunConfig:
    policies = [{"name": "topk"}, {"name": "wlr", "theta": 0.1}]
    return RunConfig.model_validate({"name": "test", "device": [{"name": "a"}], "policy": policies, **more})


def test_without_a_word_it_is_the_run_files_first_policy() -> None:
    assert [policy.name for policy in with_policy(config(), None).policies] == ["topk"]


@pytest.mark.parametrize(
    ("asked", "name", "params"),
    [
        ("topk", "topk", {}),
        ("wlr:theta=0.2", "wlr", {"theta": 0.2}),
        ("load_aware:budget=0.1,period=block", "load_aware", {"budget": 0.1}),
        ("my_policy:MyPolicy", "my_policy:MyPolicy", {}),
        ("my_policy:MyPolicy:share=1,word=a", "my_policy:MyPolicy", {"share": 1, "word": "a"}),
    ],
)
def test_a_policy_is_named_with_its_parameters(asked: str, name: str, params: dict[str, object]) -> None:
    (policy,) = with_policy(config(), asked).policies
    assert (policy.name, policy.params) == (name, params)


@pytest.mark.parametrize(
    "asked",
    ["topk", "wlr:theta=0.2", "load_aware:budget=0.1,period=block", "my_policy:MyPolicy:share=1,word=a,yes=true"],
)
def test_a_policys_words_are_those_it_was_asked_for_with(asked: str) -> None:
    (policy,) = with_policies(config(), [asked]).policies
    assert policy_words(policy) == asked


def test_several_are_asked_for_in_their_order_and_none_means_all_of_the_run_file() -> None:
    assert [policy_words(policy) for policy in with_policies(config(), []).policies] == ["topk", "wlr:theta=0.1"]
    asked = ["wlr:theta=0.3", "topk"]
    assert [policy_words(policy) for policy in with_policies(config(), asked).policies] == asked


def test_nothing_else_of_the_run_file_changes() -> None:
    before = config(wire={"down": "fp16"}, seed=7, placement={"a": [1, 0]})
    assert with_policy(before, "wlr:theta=0.2").model_copy(update={"policies": before.policies}) == before


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("wlr:theta=0.2,", "write NAME:KEY=VALUE"),
        ("wlr:=3", "write NAME:KEY=VALUE"),
        ("no good", "must be a built-in policy"),
        ("wlr:theta=nan", "finite"),
        ("wlr:theta=0.2,bandwidth=optimal", "no band to share out"),
    ],
)
def test_a_policy_that_cannot_be_is_refused_in_one_line(asked: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        with_policy(config(), asked)
    assert "\n" not in str(caught.value)


def test_prompts_are_lines_or_objects_of_a_jsonl_file(tmp_path: Path) -> None:
    lines, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("def f(\n\nimport os\n")
    objects.write_text('{"prompt": "a\\nb", "id": 1}\n{"prompt": ""}\n')
    assert read_prompts(lines) == ["def f(", "import os"]
    assert read_prompts(objects) == ["a\nb", ""]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"", "holds no prompt"),
        ("p.txt", b"\xff", "not UTF-8"),
        ("p.jsonl", b"{}", "line 1 must be an object"),
        ("p.jsonl", b'{"prompt": "a"}\n[1]', "line 2 must be an object"),
        ("p.jsonl", b'{"prompt": 3}', "line 1 must be an object"),
        ("p.jsonl", b"[" * 100_000, "line 1 must be an object"),
        ("p.txt", b"a" * (2**24 + 1), "larger than"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        read_prompts(file)
    with pytest.raises(ConfigError, match="no such file"):
        read_prompts(tmp_path / "missing")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path)
