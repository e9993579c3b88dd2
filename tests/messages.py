"""Messages in tests."""

from __future__ import annotations

from typing import Any


def replace(message: Any, **changed: Any) -> Any:
    """The same message with other values in some of its fields."""
    return message._replace(**changed)
