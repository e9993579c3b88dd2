"""The run file's sections on what nodes and links pretend to be."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from testbed.config.base import DeviceName, Section


class EmulationSection(Section):
    """What nodes and links pretend to be. Emulated time runs slower than real time, so that real overhead is small."""

    # Rows weigh, and compute costs, what those of a model with this width and expert size would; None: the model's own.
    as_if_width: Annotated[int, Field(ge=1, le=2**20)] | None = None
    as_if_inner: Annotated[int, Field(ge=1, le=2**24)] | None = None
    compute: Literal["paper", "roofline"] = "paper"
    weight_bytes_per_value: Annotated[float, Field(gt=0, le=8)] = 2.0  # roofline: experts in fp16
    dilation: Annotated[float, Field(ge=1, le=1000)] = 5.0  # every emulated time is stretched by it ...
    decode_dilation: Annotated[float, Field(ge=1, le=1000)] = 10.0  # ... and by this while tokens are decoded
    links: Literal["relay", "namespaces"] = "relay"  # how [radio] comes about


class ThrottleSection(Section):
    """A device that is slower for some prompts, as one that grows too hot."""

    device: DeviceName
    from_prompt: Annotated[int, Field(ge=0)]
    until_prompt: Annotated[int, Field(ge=1)]  # the first prompt at full speed again
    factor: Annotated[float, Field(ge=1, le=1e6)] = 10.0

    @model_validator(mode="after")
    def _lasts_a_while(self) -> ThrottleSection:
        if self.until_prompt <= self.from_prompt:
            raise ValueError(f"until_prompt ({self.until_prompt}) must be above from_prompt ({self.from_prompt})")
        return self

    def factor_at(self, prompt: int) -> float:
        return self.factor if self.from_prompt <= prompt < self.until_prompt else 1.0
