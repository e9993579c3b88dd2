"""`testbed split OWNER/NAME`: a model by name, from a server that speaks the hub's protocol."""
# ruff: noqa: E402 - what is imported below needs what importorskip has just found

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from families import tiny_model
from hub_server import COMMIT, HubServer
from huggingface_hub import constants

from testbed.checkpoint.fetching import fetch
from testbed.checkpoint.manifest import load_manifest, verify_file
from testbed.cli import main

pytestmark = pytest.mark.torch
NAME = "some-lab/small-moe"
NODES = '[[node]]\nname = "near"\n[[node]]\nname = "far"\n'
HALF = 12_000_000
CHUNK = constants.DOWNLOAD_CHUNK_SIZE
FETCH = "import sys; from testbed.checkpoint.fetching import fetch; fetch(sys.argv[1])"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    tiny_model("mixtral", num_hidden_layers=2, vocab_size=32_000).save_pretrained(folder)  # 17 MB: two chunks
    return folder


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(checkpoint, NAME) as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.endpoint)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield server


@pytest.fixture
def nodes(tmp_path: Path) -> Path:
    file = tmp_path / "nodes.toml"
    file.write_text(NODES)
    return file


def typed(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return document


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, name: str = NAME) -> str:
    """The one line that was told."""
    capsys.readouterr()
    assert main(["split", name, *map(str, arguments)]) == 3
    told = capsys.readouterr().err
    assert told.startswith(f"error: {name}: ")
    assert told.count("\n") == 1
    return told


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_a_model_by_name_is_split_and_the_manifest_has_the_commit(
    revision: str | None, hub: HubServer, nodes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pinned = [] if revision is None else ["--revision", revision]
    typed(capsys, "split", NAME, "--nodes", nodes, "--out", tmp_path / "out", *pinned)
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.model_name, manifest.hub_commit) == (NAME, COMMIT)
    for name in manifest.files:
        verify_file(tmp_path / "out", name, manifest)
    assert {path for _, path, _ in hub.requests if "/resolve/" in path} >= {
        f"/{NAME}/resolve/{COMMIT}/{name}" for name in ("config.json", "model.safetensors")
    }


def test_a_dry_run_and_place_ask_the_hub_for_headers_and_no_weights(
    hub: HubServer, checkpoint: Path, nodes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from_hub = typed(capsys, "split", NAME, "--nodes", nodes, "--dry-run")
    from_folder = typed(capsys, "split", checkpoint, "--nodes", nodes, "--dry-run")
    assert (from_hub["model"], from_hub["hub_commit"]) == (NAME, COMMIT)
    own = {"model", "hub_commit"}
    assert {key: from_hub[key] for key in from_hub if key not in own} == {
        key: from_folder[key] for key in from_folder if key not in own
    }
    assert hub.ranges() == ["bytes=0-100000"]
    typed(capsys, "place", NAME, "--nodes", nodes)
    assert len(hub.ranges()) == 1


def test_a_download_that_was_cut_off_goes_on_where_it_was(
    hub: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    hub.weight_bytes = HALF
    folder = fetch(NAME).folder
    assert (folder / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert hub.ranges() == [None, f"bytes={CHUNK}-"]


def test_a_download_that_was_killed_goes_on_where_it_was(hub: HubServer, checkpoint: Path, tmp_path: Path) -> None:
    hub.weight_bytes, hub.stall = HALF, threading.Event()
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "hub")}
    with subprocess.Popen([sys.executable, "-c", FETCH, NAME], env=environment, stderr=subprocess.DEVNULL) as child:
        begun: list[Path] = []
        while child.poll() is None and not (begun and begun[0].stat().st_size >= CHUNK - 8192):
            begun = list((tmp_path / "hub").glob("models--*/blobs/*.begun"))
        child.kill()
    written = begun[0].stat().st_size
    hub.stall.set()
    hub.weight_bytes = 10**9
    folder = fetch(NAME).folder
    assert (folder / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert hub.ranges() == [None, f"bytes={written}-"]


def test_a_download_that_came_damaged_is_refused_and_begun_anew(
    hub: HubServer, nodes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.flip = True
    asked = ["--nodes", nodes, "--out", tmp_path / "out"]
    assert "model.safetensors came damaged (its sha256 is not the hub's); start it again" in refused(capsys, *asked)
    hub.flip = False
    typed(capsys, "split", NAME, *asked)
    assert hub.ranges() == [None, None]


def test_without_a_network_the_cache_serves_what_it_has_and_says_what_it_lacks(
    hub: HubServer, nodes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(NAME)
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert typed(capsys, "split", NAME, "--nodes", nodes, "--dry-run")["hub_commit"] == COMMIT
    assert "the hub is out of reach" in refused(capsys, "--nodes", nodes, "--dry-run", name="some-lab/another")
    assert "the hub is out of reach" in refused(capsys, "--nodes", nodes, "--dry-run", "--revision", "v1")
    assert len(hub.requests) == asked


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, "RepoNotFound", "no such model on the hub, or a private one"),
        (401, "", "no such model on the hub, or a private one; check the name, or log in"),
        (403, "GatedRepo", "is gated: accept its terms at http://127.0.0.1"),
        (403, "", "out of reach (HTTP 403)"),
        (500, "", "out of reach (HTTP 500)"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    status: int, code: str, words: str, hub: HubServer, nodes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refuse = lambda _: (status, code)
    assert words in refused(capsys, "--nodes", nodes, "--dry-run")


def test_a_gate_that_only_guards_the_files_is_one_line(
    hub: HubServer, nodes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refuse = lambda path: (403, "GatedRepo") if "/resolve/" in path else None
    assert "is gated: accept its terms at" in refused(capsys, "--nodes", nodes, "--dry-run")


def test_names_and_revisions_that_are_none_are_one_line(
    hub: HubServer, nodes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no such model on the hub" in refused(capsys, "--nodes", nodes, "--dry-run", name="some-lab/another")
    assert "no revision v9 on the hub" in refused(capsys, "--nodes", nodes, "--dry-run", "--revision", "v9")
    assert hub.ranges() == []


def test_a_hub_that_does_not_answer_is_one_line(
    hub: HubServer, nodes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the hub is out of reach" in refused(capsys, "--nodes", nodes, "--dry-run")


def test_a_disk_that_fills_up_while_downloading_is_one_line(
    hub: HubServer, nodes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fetch(NAME, headers_only=True)  # small files are there
    monkeypatch.setattr("testbed.checkpoint.hub_weights.http_get", full)
    told = refused(capsys, "--nodes", nodes, "--out", tmp_path / "out")
    assert f"no space left in {tmp_path / 'hub'}; free some, or set HF_HOME" in told
    assert not (tmp_path / "out").exists()


def test_a_model_without_safetensors_or_with_broken_ones_is_refused(
    checkpoint: Path, tmp_path: Path, hub: HubServer, nodes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.folder = tmp_path / "other"
    shutil.copytree(checkpoint, hub.folder)
    (hub.folder / "model.safetensors").write_bytes(b"\xff" * 200)
    assert "model.safetensors is no safetensors file" in refused(capsys, "--nodes", nodes, "--dry-run")
    (hub.folder / "model.safetensors").rename(hub.folder / "pytorch_model.bin")
    capsys.readouterr()
    assert main(["split", NAME, "--nodes", str(nodes), "--dry-run"]) == 3
    assert "weight file model.safetensors is missing; safetensors are needed" in capsys.readouterr().err
