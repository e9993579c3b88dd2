"""The run file's policies, and what they work with: the links' state, a target, rates of real links."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue, model_validator

from testbed.config.base import Section


def _policy_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*|[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
        raise ValueError('must be a built-in policy or, for one of your own, "package.module:Class"')
    return value


class PolicySpec(Section, extra="allow"):
    """A policy's name, and how the band is shared out under it; every other key of its table is a parameter.

    bandwidth: the split of [radio] bandwidth_hz among the devices, or of [shaping] bits_per_s. period: when it is made,
    for every block by its own load, once per prompt by those of recent blocks, or once for all.
    """

    __pydantic_extra__: dict[str, JsonValue]
    name: Annotated[str, AfterValidator(_policy_name)]
    bandwidth: Literal["even", "proportional", "optimal"] = "even"
    period: Literal["block", "prompt", "static"] = "block"

    @property
    def params(self) -> dict[str, JsonValue]:
        return dict(self.__pydantic_extra__)

    @model_validator(mode="after")
    def _the_split_is_its_own(self) -> PolicySpec:
        if self.bandwidth == "even" and self.period != "block":
            raise ValueError('period: without effect while the band is shared evenly; add bandwidth = "optimal"')
        if self.bandwidth != "even" and self.name in ("joint", "oracle"):
            raise ValueError(f"bandwidth: {self.name} shares out the band by itself; remove it")
        return self

    @model_validator(mode="after")
    def _parameters_are_finite(self) -> PolicySpec:
        for key, value in self.params.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key} must be a finite number, not {value}")
        return self


class CsiSection(Section):
    """What the base station knows of the links whose band it shares out."""

    # estimated: from measured rates; reported: the true gain, told by each device at a prompt's start, off by error_db
    source: Literal["estimated", "reported"] = "estimated"
    error_db: Annotated[float, Field(ge=0, le=40, allow_inf_nan=False)] = 0.0  # standard deviation of a report


class ShapingSection(Section):
    """Rates of real links, set by tc: rate shaping, not spectrum. Every [[device]] then needs its address."""

    interface: Annotated[str, Field(pattern=r"^[A-Za-z0-9._@-]{1,15}$")]  # the base station's, towards the devices
    bits_per_s: Annotated[float, Field(ge=1e4, le=1e12, allow_inf_nan=False)]  # each way, for all devices together


class SteeringSection(Section):
    """What policies with a strength (theta, budget) are steered to, online, from their own setting on."""

    target_ms: Annotated[float, Field(gt=0, le=1e7, allow_inf_nan=False)] | None = None  # mean time of a block
    quality_budget: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None  # mean dropped gate mass

    @property
    def wanted(self) -> bool:
        return self.target_ms is not None or self.quality_budget is not None
