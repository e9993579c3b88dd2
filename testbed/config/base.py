"""What every section of a run file shares."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter

Scheme = Literal["int8", "fp16", "bf16", "fp32"]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
ExpertId = Annotated[int, Field(ge=0, le=65_535)]
# TOML has lists and text where we keep tuples and paths; what is inside a list stays strict.
ExpertIds = Annotated[tuple[ExpertId, ...], Field(strict=False)]
_EVERY_LAYER = TypeAdapter[tuple[int, ...]](ExpertIds)
_LAYER_BY_LAYER = TypeAdapter[tuple[tuple[int, ...], ...]](Annotated[tuple[ExpertIds, ...], Field(strict=False)])


def _held(value: Any) -> tuple[Any, ...]:
    """Chosen by hand, not as a union, so that a mistake is told of the form that was meant."""
    lists = isinstance(value, list | tuple) and any(isinstance(item, list | tuple) for item in value)
    return _LAYER_BY_LAYER.validate_python(value) if lists else _EVERY_LAYER.validate_python(value)


HeldExperts = Annotated[tuple[Any, ...], BeforeValidator(_held)]  # of a device: in every layer, or a list per layer
Folder = Annotated[Path, Field(strict=False), AfterValidator(Path.expanduser)]


def device_name(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", value):
        raise ValueError('must be small letters, digits or "-", at most 63')
    return value


def one_address(value: str) -> str:
    try:
        address = ipaddress.IPv4Address("0.0.0.0" if value in ("*", "", "::") else value)  # noqa: S104 (refused below)
    except ValueError:
        raise ValueError('must be one IPv4 address of this machine in figures, such as "127.0.0.1"') from None
    if address.is_unspecified:
        raise ValueError('would listen on every network of this machine; name one address, such as "127.0.0.1"')
    return value


DeviceName = Annotated[str, AfterValidator(device_name)]
Address = Annotated[str, AfterValidator(one_address)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
