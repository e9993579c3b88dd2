"""Rows of a model on a GPU, on their way to the nodes and back. Not yet run on a GPU.

They are quantised where they were computed and cross as what travels; the result comes back in one copy. Host memory is
torch's pinned pool, which keeps it and gives none of it out again before the copies from and to it are done.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bs_node.blocks import Float32
from testbed.wire.quantization import Scheme, quantise
from testbed.wire.quantization_torch import encode


class Staging:
    """What a round's copies between host and GPU took, by the GPU's own stamps."""

    def __init__(self) -> None:
        self._copies: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def copied(self, device: torch.device | str, *sources: torch.Tensor) -> list[torch.Tensor]:
        """Copies that are under way, into pinned memory where they go to the host."""
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        before.record()
        copies = [source.to(device, non_blocking=True) for source in sources]
        after.record()
        self._copies.append((before, after))
        return copies

    def wait(self) -> None:
        """Until all copies are done."""
        self._copies[-1][1].synchronize()

    @property
    def total_ns(self) -> int:
        """Waits for the last copy: asked once the next round's rows have left, it is done by then."""
        self.wait()
        return int(sum(before.elapsed_time(after) for before, after in self._copies) * 1e6)


class GpuRows:
    """hidden_TD of one round, in the memory of the GPU that computed it."""

    def __init__(self, hidden_TD: torch.Tensor) -> None:
        self._hidden_TD = hidden_TD.detach()
        self.shape: tuple[int, int] = (hidden_TD.shape[0], hidden_TD.shape[1])
        self.staging = Staging()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, token_R: NDArray[np.int64]) -> Float32:
        """Rows of these tokens on the host, for experts that compute there."""
        rows: Float32 = self._hidden_TD[torch.from_numpy(token_R).to(self._hidden_TD.device)].float().cpu().numpy()
        return rows

    def quantise(self, scheme: Scheme, padded_width: int = 0) -> NDArray[np.uint8]:
        """rows_TB on the host, as `testbed.wire.quantization.quantise` makes and refuses them, bit for bit."""
        encoded = encode(self._hidden_TD.float(), scheme, padded_width)
        rows_TB, refused_T = self.staging.copied("cpu", *encoded)
        self.staging.wait()
        if refused_T.any():  # the host's codec has the last word, and the words for it
            return quantise(self._hidden_TD.float().cpu().numpy(), scheme, None, padded_width)
        on_host_TB: NDArray[np.uint8] = rows_TB.numpy()
        return on_host_TB

    def zeros(self) -> Float32:
        """Room on the host for the result, from which the GPU copies by itself."""
        out_TD: Float32 = torch.zeros(self.shape, pin_memory=self._hidden_TD.is_cuda).numpy()
        return out_TD

    def give_back(self, out_TD: Float32) -> torch.Tensor:
        """The result where hidden_TD is, in its dtype; rounded there, so that fp32 crosses from pinned memory."""
        (out,) = self.staging.copied(self._hidden_TD.device, torch.from_numpy(out_TD))
        return out.to(self._hidden_TD.dtype)


def to_host(_module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pre-hook of an experts module on a GPU: the gate's choice comes to the host, while attention's end is awaited.

    So a round's clock starts when the GPU is done, and the round itself waits for no copy of the gate's answer.
    """
    hidden_TD, *answers = args
    on_host = [answer.to("cpu", non_blocking=True) for answer in answers]
    torch.cuda.current_stream().synchronize()
    return (hidden_TD, *on_host)
