"""What a user gets wrong is one line that says what and what to do; nothing is left running, nothing overwritten."""
# ruff: noqa: E402 - what is imported below needs what importorskip has just found

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from processes import TESTBED, run, run_file
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = [pytest.mark.torch]


def run_fails(folder: Path, file: Path) -> tuple[int, str]:
    """Exit code and the one line of a run that must not start; what the logs folder held before is still there."""
    earlier = folder / "logs" / "earlier" / "manifest.json"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("{}")
    done = run([TESTBED, "run", str(file)], folder)
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert earlier.read_text() == "{}"
    return done.returncode, done.stderr


def test_an_unknown_key_of_the_run_file_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    file = run_file(tmp_path, "[timeouts]\nrepy_s = 3.0")
    assert run_fails(tmp_path, file) == (2, f'error: {file}: timeouts.repy_s: unknown key; did you mean "reply_s"?\n')
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["earlier"]


def test_a_run_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    code, told = run_fails(tmp_path, tmp_path / "none.toml")
    assert (code, told) == (2, f"error: {tmp_path}/none.toml: no such file; name an existing run file\n")


def test_a_model_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    code, told = run_fails(tmp_path, run_file(tmp_path, f'[model]\npath = "{tmp_path}/none"'))
    assert code == 3
    assert f"{tmp_path}/none: no config.json" in told


def test_a_checkpoint_without_experts_is_refused_by_what_it_is(tmp_path: Path) -> None:
    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2, num_key_value_heads=2))
    model.save_pretrained(tmp_path / "dense")
    code, told = run_fails(tmp_path, run_file(tmp_path, f'[model]\npath = "{tmp_path}/dense"'))
    assert code == 3
    assert "dense: llama has no experts" in told
    assert "use a mixture-of-experts model" in told


def test_a_port_that_another_program_has_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, told = run_fails(tmp_path, run_file(tmp_path, f"[listen]\nport = {port}"))
    assert code == 5
    assert f"cannot listen on 127.0.0.1:{port}" in told
    assert "set [listen] port = 0" in told
