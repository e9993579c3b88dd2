"""A model that brings code of its own: split and run only where its name was allowed, each time."""
# ruff: noqa: E402 - what is imported below needs what importorskip has just found

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from families import tiny_model

from bs_node.model import load_bs_model, load_tokenizer
from testbed.checkpoint.manifest import load_manifest
from testbed.checkpoint.own_code import allow_own_code
from testbed.checkpoint.split import split
from testbed.cli import main
from testbed.errors import CheckpointError

pytestmark = pytest.mark.torch
OWN_CODE = """
from transformers import MixtralConfig, MixtralForCausalLM
from .scale import SCALE
class OwnConfig(MixtralConfig):
    model_type = "own_moe"
class OwnModel(MixtralForCausalLM):
    config_class = OwnConfig
    def forward(self, *args, **options):
        output = super().forward(*args, **options)
        output.logits = output.logits * SCALE
        return output
"""
REFUSED = "own: needs code of its own .own_moe.*--trust-remote-code own, or trust_remote_code = "


@pytest.fixture(scope="module", autouse=True)
def modules_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers copies code to; once, since what is imported from there stays imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture
def own(tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    torch.manual_seed(0)
    tiny_model("mixtral", num_hidden_layers=1).save_pretrained(folder, save_original_format=False)
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own_moe", "auto_map": auto}))
    (folder / "own.py").write_text(OWN_CODE)
    (folder / "scale.py").write_text("SCALE = 3.0\n")
    return folder


@pytest.fixture
def whole(own: Path, tmp_path: Path) -> Path:
    split(own, tmp_path / "out", ["near", "far"], trusted="own")
    return tmp_path / "out"


def test_it_is_refused_at_the_command_line_unless_allowed_by_name(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = tmp_path / "nodes.toml"
    nodes.write_text('[[node]]\nname = "near"\n[[node]]\nname = "far"\n')
    asked = ["split", str(own), "--nodes", str(nodes), "--dry-run"]
    for unallowed in ([], ["--trust-remote-code", "another"]):
        assert main([*asked, *unallowed]) == 3
        told = capsys.readouterr().err
        assert "needs code of its own (own_moe)" in told
        assert "--trust-remote-code own" in told
        assert told.count("\n") == 1
    assert main([*asked, "--trust-remote-code", "own"]) == 0


def test_code_that_was_not_allowed_does_not_run(own: Path, tmp_path: Path) -> None:
    (own / "own.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'it_ran')!r}).touch()\n")
    with pytest.raises(CheckpointError, match=REFUSED):
        split(own, tmp_path / "out", ["one"])
    assert not (tmp_path / "it_ran").exists()
    with pytest.raises(CheckpointError, match="own code cannot be loaded"):
        split(own, tmp_path / "out", ["one"], trusted="own")
    assert (tmp_path / "it_ran").exists()


def test_its_code_travels_with_the_base_stations_part_and_runs_where_allowed_again(whole: Path) -> None:
    manifest = load_manifest(whole)
    assert {"own.py", "scale.py"} <= set(manifest.files)
    with pytest.raises(CheckpointError, match=REFUSED):
        load_bs_model(whole, manifest, "float32", "eager")
    model = load_bs_model(whole, manifest, "float32", "eager", trusted="own")
    assert type(model).__name__ == "OwnModel"


def test_code_that_changed_since_the_split_does_not_run(whole: Path) -> None:
    with (whole / "scale.py").open("a") as file:
        file.write("SCALE = 4.0\n")
    with pytest.raises(CheckpointError, match=r"scale.py: sha256"):
        load_bs_model(whole, load_manifest(whole), "float32", "eager", trusted="own")


def test_code_in_another_repository_is_refused(own: Path) -> None:
    config = json.loads((own / "config.json").read_text())
    config["auto_map"]["AutoConfig"] = "somebody/else--own.OwnConfig"
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="its code is in another repository"):
        allow_own_code(own, "own", "own")


def test_a_family_that_transformers_has_needs_no_code_and_takes_none_along(own: Path, tmp_path: Path) -> None:
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "model_type": "mixtral"}))
    assert not [name for name in split(own, tmp_path / "out", ["one"]).files if name.endswith(".py")]


def test_a_split_without_a_tokenizer_is_told_in_one_line(whole: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer of own in it.*put tokenizer.json") as caught:
        load_tokenizer(whole, load_manifest(whole))
    assert "\n" not in str(caught.value)
