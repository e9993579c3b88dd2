"""Where to serve, and for whom."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from testbed.errors import ConfigError

MIN_KEY_LENGTH = 16


@dataclass(frozen=True, slots=True)
class ServeSettings:
    host: str
    port: int  # 0: any free one
    models: Mapping[str, int]  # name -> index of the policy under which it answers
    keys: tuple[bytes, ...]
    max_batch: int  # continuations that share a round
    max_waiting: int
    tls: tuple[Path, Path] | None = None  # certificate chain and its key (PEM)


def read_keys(file: Path) -> tuple[bytes, ...]:
    """One key a line. Raises ConfigError for a file without any, or with one that could be guessed."""
    try:
        keys = tuple(line.strip().encode() for line in file.read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {file}: cannot be read ({error}); name a file with a key a line") from error
    if not keys:
        raise ConfigError(f"--api-key-file {file}: holds no key; write one a line")
    if min(map(len, keys)) < MIN_KEY_LENGTH:
        raise ConfigError(
            f"--api-key-file {file}: a key of less than {MIN_KEY_LENGTH} characters can be guessed; "
            "make one with: openssl rand -hex 24"
        )
    return keys


def check_address(host: str, keys: tuple[bytes, ...]) -> None:
    """Raises ConfigError for an address that others can reach while nobody is asked for a key."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise ConfigError(f"--host {host}: not an address; 127.0.0.1 is this machine only, 0.0.0.0 all of it") from None
    if not loopback and not keys:
        raise ConfigError(
            f"--host {host}: others could use it as they like; give it an --api-key-file, or stay on 127.0.0.1"
        )


def check_tls(certificate: Path | None, key: Path | None) -> tuple[Path, Path] | None:
    """Raises ConfigError for a pair that is not whole, cannot be read, or does not belong together."""
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ConfigError("--tls-cert and --tls-key go together; give both, or neither for plain HTTP")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=_no_password)
    except (OSError, ValueError) as error:
        said = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"--tls-cert {certificate} --tls-key {key}: {said}; give a certificate and its key (PEM, no password)"
        ) from error
    return certificate, key


def _no_password() -> str:
    """Instead of asking for it on the terminal."""
    raise ValueError("the key is encrypted")
