"""The folders of a user: where the system says, and nobody else's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from testbed.errors import ConfigError
from testbed.paths import cache_directory, runtime_directory


def test_folders_follow_xdg_and_are_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert cache_directory() == tmp_path / "cache" / "wdmoe-testbed"
    assert runtime_directory() == tmp_path / "wdmoe-testbed"
    assert runtime_directory().stat().st_mode & 0o777 == 0o700


def test_without_a_runtime_directory_a_private_temporary_one_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "gone"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert runtime_directory() == tmp_path / f"wdmoe-testbed-{os.getuid()}"
    assert runtime_directory().stat().st_mode & 0o777 == 0o700


def test_a_runtime_directory_that_others_can_open_or_that_is_a_link_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = runtime_directory()
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match="others can open it; chmod 700"):
        runtime_directory()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="is not a folder of this user"):
        runtime_directory()
