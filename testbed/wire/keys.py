"""CURVE keys: who may talk to whom.

A key folder of the base station holds its own pair and the public keys of the enrolled nodes; a node holds its own
pair and the base station's public key:

    bs.key  bs.pub  nodes/<device>.pub          at the base station
    <device>.key  <device>.pub  bs.pub          at a node

Secret files are made with mode 0600 and refused where others may read them. A key is Z85 text, one line.
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils import z85

from testbed.errors import ConfigError


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A CURVE pair as Z85 text; the secret half never shows in repr."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"KeyPair(public={self.public!r})"


def make_pair() -> KeyPair:
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


def is_key(text: str) -> bool:
    """Whether this is Z85 of the 32 bytes that a CURVE key has."""
    try:
        return len(z85.decode(text)) == 32
    except (ValueError, KeyError, struct.error):  # its length, its characters, a group of five above 2**32 - 1
        return False


def write_pair(folder: Path, name: str, pair: KeyPair) -> None:
    """Write `name.key` (0600) and `name.pub`; an existing secret is never overwritten (ConfigError)."""
    _write(folder / f"{name}.key", pair.secret, os.O_EXCL, 0o600)
    write_public(folder, name, pair.public)


def write_public(folder: Path, name: str, public: str) -> None:
    _write(folder / f"{name}.pub", public, os.O_TRUNC, 0o644)


def _write(path: Path, key: str, flag: int, mode: int) -> None:
    try:
        _make_private(path.parent)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | flag, mode), "w") as file:
            file.write(key + "\n")
    except FileExistsError as error:
        raise ConfigError(f"{error.filename} exists already: move it away first if you want a new key") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: choose a folder that keys can be written to") from None


def _make_private(folder: Path) -> None:
    """Like `mkdir -p`, but every folder it makes is ours alone, whatever the umask."""
    if not folder.is_dir():
        _make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def read_public(path: Path) -> str:
    """A public key. Raises ConfigError where it is missing or not a key."""
    try:
        text = path.read_text("ascii", "replace").strip()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: copy the public key there") from None
    if not is_key(text):
        raise ConfigError(f"{path}: not a CURVE public key (40 characters of Z85)")
    return text


def read_pair(folder: Path, name: str) -> KeyPair:
    """The pair of `name`. Raises ConfigError where a file is missing, malformed, or readable by others."""
    path = folder / f"{name}.key"
    try:
        with path.open(encoding="ascii", errors="replace") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            secret = file.read().strip()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: put the key pair of {name} there") from None
    if mode & 0o077:
        raise ConfigError(f"{path}: mode {mode:04o} lets others read a secret key: chmod 600 it")
    if not is_key(secret):
        raise ConfigError(f"{path}: not a CURVE secret key (40 characters of Z85)")
    public = read_public(folder / f"{name}.pub")
    if zmq.curve_public(secret.encode()).decode() != public:
        raise ConfigError(f"{path}: does not belong to {name}.pub beside it: put both files of one pair there")
    return KeyPair(public, secret)


def enrolled_nodes(folder: Path) -> dict[str, str]:
    """Allow-list of a base station: public key -> device name. Raises ConfigError where it is missing or unclear."""
    if not (folder / "nodes").is_dir():
        raise ConfigError(f"{folder / 'nodes'}: no such folder: put the public key of every node there")
    nodes: dict[str, str] = {}
    for path in sorted((folder / "nodes").glob("*.pub")):
        key = read_public(path)
        if key in nodes:
            raise ConfigError(f"{path}: the same key is enrolled as {nodes[key]}: every device needs its own")
        nodes[key] = path.stem
    return nodes


def make_run_keys(folder: Path, devices: list[str]) -> None:
    """Keys for one run on this machine: a pair for the base station and one per device, each side's in its place."""
    station = make_pair()
    write_pair(folder / "bs", "bs", station)
    for device in devices:
        pair = make_pair()
        write_pair(folder / device, device, pair)
        write_public(folder / device, "bs", station.public)
        write_public(folder / "bs" / "nodes", device, pair.public)
