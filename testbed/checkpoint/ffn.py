"""What a node must know to compute an expert, and nothing else of the model.

    gated:    down(act(gate(x)) * up(x))                            54 of the 65 experts classes of transformers 5.23
    alpha:    down((up(x) + 1) * gate(x) * sigmoid(alpha * gate(x)))
    not gated: down(act(up(x)))

Weights are canonical in every shard: matrices [out, in], the gate's rows before the up rows.
D row width, I inner width.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Activation = Literal["silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2"]
SumDtype = Literal["hidden", "weight", "float32"]


class FfnSpec(BaseModel):
    """The feed-forward network of every expert of one layer."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    width: int = Field(ge=1, le=2**20)  # D of the weights: a latent width may differ from the model's hidden size
    inner: int = Field(ge=1, le=2**20)
    has_gate: bool = True
    has_bias: bool = False
    act: Activation = "silu"
    limit: float | None = Field(default=None, gt=0)  # gate <= limit and -limit <= up <= limit, before the activation
    alpha: float | None = Field(default=None, gt=0)
    sum_dtype: SumDtype = (
        "hidden"  # what the base station sums a layer in: dtype of hidden, of the gate's weights, fp32
    )

    @property
    def first(self) -> str:
        """Name of the first matrix."""
        return "gate_up" if self.has_gate else "up"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the tensors of one expert, in the order in which a shard stores them."""
        rows = 2 * self.inner if self.has_gate else self.inner
        shapes: dict[str, tuple[int, ...]] = {self.first: (rows, self.width), "down": (self.width, self.inner)}
        if self.has_bias:
            shapes |= {f"{self.first}_bias": (rows,), "down_bias": (self.width,)}
        return shapes


def tensor_name(layer: int, expert: int, part: str) -> str:
    """Name of an expert's tensor in a shard."""
    return f"{layer}.{expert}.{part}"
