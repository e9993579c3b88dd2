"""Its being here puts this folder on the import path: tests share modules such as `families`."""

from __future__ import annotations

import os


def pytest_sessionstart() -> None:
    """Nobody watches: what is printed does not depend on the terminal from which tests are started."""
    os.environ.pop("COLUMNS", None)
