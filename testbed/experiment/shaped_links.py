"""Real links that keep to shares of a total rate, by tc on both sides: rate shaping, not spectrum.

Not yet run on hardware; the shapers themselves are tested between network namespaces.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from testbed.config import RunConfig, ShapingSection
from testbed.latency.csi import ShapedCsi
from testbed.policies.base import FloatArray
from testbed.shaping import DownlinkShaper

WORTH_TELLING = 0.01  # of a rate: by less, a node's uplink is not changed

AskNode = Callable[[int, float], bool]


class ShapedLinks:
    """The base station's own interface, and what its nodes are asked to keep to. Use as a context manager, made before
    the base station listens: connections made earlier are shaped less finely. Raises ConfigError."""

    def __init__(self, config: RunConfig, section: ShapingSection) -> None:
        addresses = {device.name: device.address or "" for device in config.devices}
        self.csi = ShapedCsi(section.bits_per_s)
        self._total_bits_per_s = section.bits_per_s
        self._shaper = DownlinkShaper(section.interface, addresses, section.bits_per_s)
        self._told_N = np.zeros(len(addresses))
        self.ask_node: AskNode = lambda _device, _bits_per_s: False  # set once there is a base station

    def __enter__(self) -> ShapedLinks:
        self._shaper.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._shaper.close()

    def share_band(self, share_N: FloatArray) -> None:
        """Give device n share_N[n] of the total rate, each way, from now on."""
        rate_N = share_N * self._total_bits_per_s
        self._shaper.set_rates(rate_N)
        for device in np.flatnonzero(np.abs(rate_N - self._told_N) > WORTH_TELLING * self._told_N).tolist():
            if self.ask_node(device, float(rate_N[device])):
                self._told_N[device] = rate_N[device]
