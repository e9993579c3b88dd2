"""A `testbed` command as it is typed, in this process."""

from __future__ import annotations

import pytest

from testbed.cli import main


def typed(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    """What it prints on stdout and stderr. Fails where it does not end with `code`."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    told = capsys.readouterr()
    return told.out, told.err
