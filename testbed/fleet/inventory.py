"""Boards as an Ansible inventory (YAML) names them: the part of its format that a rack of boards needs.

Groups with `hosts`, `vars` and `children`, and beside the file `group_vars/GROUP.yml` and `host_vars/HOST.yml`. Ranges
of hosts and values that only Ansible can work out (templates, vault) are refused where they matter, and else ignored.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed.errors import ConfigError

MOST_BYTES = 1 << 20
MOST_DEPTH = 16
MOST_HOSTS = 1024
MOST_ALIASES = 1000
DEVICES, STATION = "jetsons", "base_station"  # groups
UNIT, NODE_PYTHON, BS_PORT = "wdmoe-node.service", "/opt/testbed/venv/bin/python", 5555
DEVICE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
HOST = re.compile(r"[A-Za-z0-9:][A-Za-z0-9.:_-]{0,252}")
PLAIN = re.compile(r"[A-Za-z0-9_./@:+-]+")


@dataclass(frozen=True)
class Board:
    """One device, and how it is reached."""

    name: str
    address: str
    user: str | None
    port: int | None
    key: Path | None
    ssh_arguments: tuple[str, ...]
    unit: str  # of systemd, which runs the node
    python: str  # the interpreter on the board that a node runs on
    bs_address: str | None
    virtual: bool


@dataclass(frozen=True)
class Inventory:
    """The devices, in the file's order, and what they know of the base station."""

    file: Path
    boards: tuple[Board, ...]
    bs_port: int
    keys: Path | None  # at the base station, as `testbed keys` makes them
    split: Path | None  # the split model that the boards' shards are of
    links: str | None  # what the boards' links are, in words for a run's log

    @property
    def bs_address(self) -> str:
        """Where the base station listens: the same for all. Raises ConfigError."""
        addresses = {board.bs_address for board in self.boards}
        if len(addresses) != 1 or None in addresses:
            raise ConfigError(f"{self.file}: give wdmoe_bs_address, the base station's IPv4 address, once in all.vars")
        return str(addresses.pop())

    def chosen(self, names: list[str]) -> tuple[Board, ...]:
        """The boards of these names, or all where none is named. Raises ConfigError for a name that is not there."""
        known = [board.name for board in self.boards]
        for name in names:
            if name not in known:
                raise ConfigError(f"{self.file}: no device {name}; there are {', '.join(known)}")
        return tuple(board for board in self.boards if not names or board.name in names)


def read_inventory(file: Path) -> Inventory:
    """Read and check an inventory. Raises ConfigError: the file, the host, what is wrong, what to do."""
    content = _mapping(_load(file), file, "the file")
    if "all" not in content:
        content = {"all": {"children": content}}
    hosts: dict[str, _Host] = {}
    for name, group in content.items():
        _walk(str(name), group, (), {}, file, hosts)
    there = any(DEVICES in host.groups for host in hosts.values())
    chosen = {
        name: host for name, host in hosts.items()
        if (DEVICES in host.groups if there else STATION not in host.groups)
    }  # fmt: skip
    if not chosen:
        raise ConfigError(f"{file}: names no device: put hosts into the group {DEVICES}")
    boards = tuple(_board(name, host.variables, file) for name, host in chosen.items())
    everywhere = {key: value for host in hosts.values() for key, value in host.variables.items()}
    port = _port(everywhere.get("wdmoe_bs_port", BS_PORT), "wdmoe_bs_port", file)
    keys, split = (_folder(everywhere.get(key), key, file) for key in ("wdmoe_keys", "wdmoe_split"))
    links = everywhere.get("wdmoe_links")
    return Inventory(file, boards, port, keys, split, _text(links, "wdmoe_links", file) if links else None)


@dataclass
class _Host:
    groups: set[str]
    variables: dict[str, Any]


def _walk(
    name: str, group: Any, above: tuple[str, ...], inherited: Mapping[str, Any], file: Path, hosts: dict[str, _Host]
) -> None:
    """Collect a group's hosts and its children's. What is said nearer to a host holds."""
    if len(above) >= MOST_DEPTH:
        raise ConfigError(f"{file}: groups nested deeper than {MOST_DEPTH}: {name}")
    where = f"group {name}"
    table = {} if group is None else _mapping(group, file, where)
    if unknown := sorted(set(map(str, table)) - {"hosts", "vars", "children"}):
        raise ConfigError(f"{file}: {where}: unknown key {unknown[0]!r}; known here are hosts, vars, children")
    own = {**_beside(file, "group_vars", name), **_mapping(table.get("vars") or {}, file, f"{where}: vars")}
    variables = {**inherited, **own}
    groups = (*above, name)
    for host, said in _mapping(table.get("hosts") or {}, file, f"{where}: hosts").items():
        if "[" in str(host):
            raise ConfigError(f"{file}: {where}: {host}: write every host out, ranges are not read here")
        found = hosts.setdefault(str(host), _Host(set(), {}))
        found.groups.update(groups)
        of_host = _mapping(said or {}, file, f"host {host}")
        found.variables |= {**variables, **_beside(file, "host_vars", str(host)), **of_host}
        if len(hosts) > MOST_HOSTS:
            raise ConfigError(f"{file}: names more than {MOST_HOSTS} hosts")
    for child, content in _mapping(table.get("children") or {}, file, f"{where}: children").items():
        _walk(str(child), content, groups, variables, file, hosts)


def _beside(file: Path, folder: str, name: str) -> dict[str, Any]:
    """Variables from group_vars or host_vars; a folder of files there is Ansible's alone."""
    if not re.fullmatch(r"[\w.-]+", name):
        return {}
    found = [file.parent / folder / f"{name}{suffix}" for suffix in (".yml", ".yaml")]
    merged: dict[str, Any] = {}
    for path in found:
        if path.is_file() and path.read_bytes()[:14] != b"$ANSIBLE_VAULT":
            merged |= _mapping(_load(path) or {}, path, "the file")
    return merged


def _load(file: Path) -> Any:
    import yaml  # noqa: PLC0415 - comes with the base station's packages, and a node needs none of this

    try:
        if file.stat().st_size > MOST_BYTES:
            raise ConfigError(f"{file}: larger than {MOST_BYTES} bytes: name an inventory (YAML)")
        text = file.read_text("utf-8")
        events = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            events += isinstance(event, yaml.AliasEvent)
            if events > MOST_ALIASES:
                raise ConfigError(f"{file}: too many aliases: write the values out")
        return yaml.load(text, Loader=_loader())  # noqa: S506 (a SafeLoader)
    except OSError as error:
        raise ConfigError(
            f"{file}: {error.strerror}: name an inventory (YAML), as `testbed rack up` writes it"
        ) from None
    except (UnicodeDecodeError, RecursionError):
        raise ConfigError(f"{file}: is not an inventory in YAML") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" line {mark.line + 1}:"
        raise ConfigError(f"{file}:{line} not valid YAML: {getattr(error, 'problem', None) or 'mend it'}") from None


def _loader() -> Any:
    """Knows nothing but plain values; what Ansible marks (!vault, !unsafe) is there, without its value."""
    import yaml  # noqa: PLC0415

    class Loader(yaml.SafeLoader):
        pass

    for tag in ("!vault", "!unsafe", "!vault-encrypted"):
        Loader.add_constructor(tag, lambda _loader, _node: None)
    return Loader


def _mapping(value: Any, file: Path, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: {where} must be a table of keys; see the inventory that `testbed rack up` writes")
    return value


def _board(name: str, variables: Mapping[str, Any], file: Path) -> Board:
    where = f"host {name}"
    if not DEVICE_NAME.fullmatch(name):
        raise ConfigError(f"{file}: {where}: small letters, digits or '-', at most 63: it names a device of a run")
    texts = dict(_texts(variables, file, where))
    address = texts.get("ansible_host", name)
    for key, value in (("ansible_host", address), ("ansible_user", texts.get("ansible_user", "root"))):
        if not HOST.fullmatch(value):
            raise ConfigError(f"{file}: {where}: {key}: {value!r} is no name or address")
    port = variables.get("ansible_port")
    key_file = texts.get("ansible_ssh_private_key_file")
    return Board(
        name=name,
        address=address,
        user=texts.get("ansible_user"),
        port=None if port is None else _port(port, f"{where}: ansible_port", file),
        key=None if key_file is None else Path(key_file).expanduser(),
        ssh_arguments=_ssh_arguments(texts.get("ansible_ssh_common_args", ""), f"{file}: {where}"),
        unit=_plain(texts.get("wdmoe_unit", UNIT), "wdmoe_unit", file),
        python=_plain(texts.get("wdmoe_python", NODE_PYTHON), "wdmoe_python", file),
        bs_address=texts.get("wdmoe_bs_address"),
        virtual=variables.get("wdmoe_virtual") is True,
    )


READ = (
    "ansible_host", "ansible_user", "ansible_ssh_private_key_file", "ansible_ssh_common_args", "wdmoe_unit",
    "wdmoe_python", "wdmoe_bs_address",
)  # fmt: skip


def _texts(variables: Mapping[str, Any], file: Path, where: str) -> Iterator[tuple[str, str]]:
    for key in READ:
        if variables.get(key) is not None:
            yield key, _text(variables[key], f"{where}: {key}", file)


def _text(value: Any, where: str, file: Path) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ConfigError(f"{file}: {where}: must be text on one line")
    if "{{" in value or "{%" in value:
        raise ConfigError(f"{file}: {where}: {value!r} is a template, which only Ansible can work out: write the value")
    return value


def _plain(value: str, where: str, file: Path) -> str:
    """A word that a shell leaves as it is."""
    if not PLAIN.fullmatch(value):
        raise ConfigError(f"{file}: {where}: {value!r}: letters, digits and _./@:+- only")
    return value


def _folder(value: Any, where: str, file: Path) -> Path | None:
    return Path(_text(value, where, file)).expanduser() if value else None


def _port(value: Any, where: str, file: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**16:
        raise ConfigError(f"{file}: {where}: must be a port, from 1 to 65535")
    return value


def _ssh_arguments(text: str, where: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(f"{where}: ansible_ssh_common_args: {error}: mend the quotes") from None
