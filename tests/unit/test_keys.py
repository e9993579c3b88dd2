from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.errors import ConfigError
from testbed.wire.keys import (
    enrolled_nodes,
    is_key,
    make_pair,
    make_run_keys,
    read_pair,
    read_public,
    write_pair,
    write_public,
)

ANY_MODE = pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o666, 0o610, 0o601])


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def one_line(error: pytest.ExceptionInfo[ConfigError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def every_file(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_pair_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    pair = make_pair()
    write_pair(tmp_path / "keys", "near", pair)
    assert read_pair(tmp_path / "keys", "near") == pair
    assert read_public(tmp_path / "keys" / "near.pub") == pair.public


def test_every_pair_is_another_one() -> None:
    assert len({make_pair().secret for _ in range(20)}) == 20


@pytest.mark.usefixtures("no_umask")
def test_secrets_are_ours_alone_whatever_the_umask(tmp_path: Path) -> None:
    make_run_keys(tmp_path / "a" / "b", ["near", "far"])
    for path in (tmp_path / "a").rglob("*"):
        assert mode_of(path) == {".key": 0o600, ".pub": 0o644}.get(path.suffix, 0o700), path
    assert mode_of(tmp_path / "a") == 0o700


@ANY_MODE
def test_a_secret_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    write_pair(tmp_path, "near", make_pair())
    (tmp_path / "near.key").chmod(mode)
    with pytest.raises(
        ConfigError, match=f"near.key: mode {mode:04o} lets others read a secret key: chmod 600"
    ) as error:
        read_pair(tmp_path, "near")
    one_line(error)


def test_a_secret_that_its_owner_may_only_read_is_taken(tmp_path: Path) -> None:
    write_pair(tmp_path, "near", make_pair())
    (tmp_path / "near.key").chmod(0o400)
    assert read_pair(tmp_path, "near")


def test_a_secret_is_never_overwritten(tmp_path: Path) -> None:
    first = make_pair()
    write_pair(tmp_path, "near", first)
    with pytest.raises(ConfigError, match=r"near.key exists already: move it away first") as error:
        write_pair(tmp_path, "near", make_pair())
    one_line(error)
    assert read_pair(tmp_path, "near") == first


def test_keys_are_not_written_through_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "near.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="exists already"):
        write_pair(tmp_path, "near", make_pair())
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "keys"):
        with pytest.raises(ConfigError, match="file") as error:
            write_pair(folder, "near", make_pair())
        one_line(error)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"short",
        b"x" * 39,
        b"x" * 41,
        b"x" * 80,
        b"#" * 40,  # the right characters, but more than 32 bytes can say
        b"x" * 39 + b" ",
        b"x" * 39 + b"~",
        b"\xff\xfe" * 20,
        "é".encode() * 40,
        b"\x00" * 40,
        b"x" * 20 + b"\n" + b"x" * 20,
    ],
)
def test_what_is_not_a_key_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    write_pair(tmp_path, "near", make_pair())
    (tmp_path / "near.pub").write_bytes(content)
    with pytest.raises(ConfigError, match=r"near\.pub: not a CURVE public key") as public:
        read_public(tmp_path / "near.pub")
    one_line(public)
    (tmp_path / "near.key").write_bytes(content)
    with pytest.raises(ConfigError, match=r"near\.key: not a CURVE secret key") as secret:
        read_pair(tmp_path, "near")
    assert content.decode("latin-1") not in one_line(secret) or len(content) < 2


def test_a_key_is_40_characters_of_z85() -> None:
    pair = make_pair()
    assert is_key(pair.public)
    assert is_key(pair.secret)
    assert not is_key(pair.public[:-5])


def test_a_missing_file_is_one_line_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"near\.key: No such file") as secret:
        read_pair(tmp_path, "near")
    with pytest.raises(ConfigError, match=r"near\.pub: No such file") as public:
        read_public(tmp_path / "near.pub")
    with pytest.raises(ConfigError, match="nodes: no such folder") as nodes:
        enrolled_nodes(tmp_path)
    for error in (secret, public, nodes):
        one_line(error)


def test_a_folder_in_a_keys_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "near.key").mkdir()
    with pytest.raises(ConfigError, match=r"near\.key: Is a directory") as error:
        read_pair(tmp_path, "near")
    one_line(error)


def test_halves_of_two_pairs_are_refused(tmp_path: Path) -> None:
    write_pair(tmp_path, "near", make_pair())
    write_public(tmp_path, "near", make_pair().public)
    with pytest.raises(ConfigError, match=r"near\.key: does not belong to near\.pub") as error:
        read_pair(tmp_path, "near")
    one_line(error)


def test_enrolled_nodes_are_named_by_their_files(tmp_path: Path) -> None:
    near, far = make_pair().public, make_pair().public
    write_public(tmp_path / "nodes", "near", near)
    write_public(tmp_path / "nodes", "far", far)
    assert enrolled_nodes(tmp_path) == {near: "near", far: "far"}


def test_one_key_under_two_names_is_refused(tmp_path: Path) -> None:
    public = make_pair().public
    write_public(tmp_path / "nodes", "near", public)
    write_public(tmp_path / "nodes", "far", public)
    with pytest.raises(ConfigError, match=r"near\.pub: the same key is enrolled as far") as error:
        enrolled_nodes(tmp_path)
    one_line(error)


def test_a_broken_public_key_among_the_enrolled_is_refused(tmp_path: Path) -> None:
    write_public(tmp_path / "nodes", "near", "no key")
    with pytest.raises(ConfigError, match=r"near\.pub: not a CURVE public key"):
        enrolled_nodes(tmp_path)


def test_the_secret_half_never_shows() -> None:
    pair = make_pair()
    for shown in (repr(pair), str(pair), f"{pair}", f"{[pair]}", f"{pair!a}"):
        assert pair.public in shown
        assert pair.secret not in shown


def test_a_runs_keys_give_each_side_what_it_needs_and_no_more(tmp_path: Path) -> None:
    make_run_keys(tmp_path, ["near", "far"])
    expected = {"bs/bs.key", "bs/bs.pub", "bs/nodes/near.pub", "bs/nodes/far.pub"}
    expected |= {
        f"{device}/{name}" for device in ("near", "far") for name in (f"{device}.key", f"{device}.pub", "bs.pub")
    }
    files = every_file(tmp_path)
    assert set(files) == expected
    station = read_pair(tmp_path / "bs", "bs")
    pairs = {device: read_pair(tmp_path / device, device) for device in ("near", "far")}
    assert enrolled_nodes(tmp_path / "bs") == {pair.public: device for device, pair in pairs.items()}
    for device in pairs:
        assert read_public(tmp_path / device / "bs.pub") == station.public
    for owner, pair in {"bs": station, **pairs}.items():
        assert [name for name, content in files.items() if pair.secret in content] == [f"{owner}/{owner}.key"]
