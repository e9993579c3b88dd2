"""Who may reach a server, and with which keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.errors import ConfigError
from testbed.serve.settings import check_address, check_tls, read_keys

KEY = b"0123456789abcdef"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_this_machine_alone_needs_no_key(host: str) -> None:
    check_address(host, ())


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "::", "10.0.0.1"])  # noqa: S104
def test_others_need_a_key(host: str) -> None:
    check_address(host, (KEY,))
    with pytest.raises(ConfigError, match="give it an --api-key-file, or stay on 127"):
        check_address(host, ())


def test_a_name_is_no_address_with_or_without_key() -> None:
    for keys in ((), (KEY,)):
        with pytest.raises(ConfigError, match="not an address"):
            check_address("example", keys)


def test_every_line_of_a_key_file_is_a_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("0123456789abcdef\n\n  fedcba98765432100  \n")
    assert read_keys(file) == (KEY, b"fedcba98765432100")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no key"),
        (b"\n \n", "holds no key"),
        (b"hunter2", "can be guessed"),
        (b"\xff" * 20, "cannot be read"),
    ],
)
def test_a_key_file_without_a_good_key_is_refused_and_its_keys_are_not_shown(
    tmp_path: Path, content: bytes, said: str
) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        read_keys(file)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "missing")


def test_a_certificate_without_its_key_or_one_that_is_none_is_refused(tmp_path: Path) -> None:
    assert check_tls(None, None) is None
    file = tmp_path / "cert.pem"
    file.write_text("no certificate")
    with pytest.raises(ConfigError, match="go together"):
        check_tls(file, None)
    with pytest.raises(ConfigError, match=r"No such file.*give a certificate and its key"):
        check_tls(tmp_path / "missing", file)
    with pytest.raises(ConfigError, match="give a certificate and its key"):
        check_tls(file, file)
