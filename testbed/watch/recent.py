"""Figures of a run's last rounds.

W rows, a row per device and round; Q rounds; a subset of W is named by its own letter, D for one device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from testbed.runlog.schema import GenerationPhase, Status
from testbed.runlog.summary_rows import RoundRows, waits
from testbed.watch.figures import LastRequests, LastRound, Way

KEYS = ("round", "policy", "prompt", "layer", "phase", "device", "tokens", "rows", "status", "dilation", "round_ns")
PREDICTED = ("predicted_compute_s", "predicted_down_s", "predicted_up_s")
WAYS = ("bytes_down", "bytes_up", "asked_down_bits_per_s", "asked_up_bits_per_s", "down_ns", "up_ns", "clock_bound_ns")
RECENT_COLUMNS = (*KEYS, *WAYS, *PREDICTED, "bs_sent_ns", "bs_received_ns")

Floats = NDArray[np.float64]


class Recent:
    """Some last rounds, whole ones. A column that an older run has not is unknown throughout."""

    def __init__(self, table: pa.Table, devices: int) -> None:
        self._table, self._devices = table, devices
        self._device_W, self._status_W = table["device"].to_numpy(), table["status"].to_numpy()
        self._dilation_W = self._column("dilation") if "dilation" in table.column_names else np.ones(len(table))
        self._last_W = waits(RoundRows(table)).last_R

    def last_round(self, policies: Sequence[str], epoch_ns: int | None) -> LastRound:
        """`epoch_ns` is realtime minus monotonic clock of the BS."""
        newest = self._table.slice(len(self._table) - 1).to_pylist()[0]
        round_s = (self._column("round_ns") / 1e9 / self._dilation_W)[:: self._devices]
        seen_ns = np.concatenate([self._column("bs_sent_ns"), self._column("bs_received_ns")])
        known = epoch_ns is not None and not np.isnan(seen_ns).all()
        rounds_per_s, tokens_per_s = self._per_second()
        return LastRound(
            round=newest["round"],
            policy=policies[newest["policy"]],
            prompt=newest["prompt"],
            layer=newest["layer"],
            phase=GenerationPhase(newest["phase"]).name.lower(),
            dilation=float(self._dilation_W[-1]),
            at_realtime_s=float(np.nanmax(seen_ns) + (epoch_ns or 0)) / 1e9 if known else None,
            median_s=_median(round_s),
            p95_s=_quantile(round_s, 0.95),
            rounds_per_s=rounds_per_s,
            tokens_per_s=tokens_per_s,
        )

    def requests(self, device: int) -> LastRequests:
        """One device's."""
        mine_D = (self._device_W == device) & (self._status_W == Status.ANSWERED) & (self._column("rows") > 0)
        dilation_D = self._dilation_W[mine_D]
        expected_D = sum(self._column(name)[mine_D] for name in PREDICTED) + np.zeros(len(dilation_D))
        taken_ns_D = (self._column("bs_received_ns") - self._column("bs_sent_ns"))[mine_D]
        measured_D = taken_ns_D / 1e9 / dilation_D
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio_D = np.where(expected_D > 0, measured_D / expected_D, np.nan)
        return LastRequests(
            waited_for=float(self._last_W[self._device_W == device].mean()),
            expected_s=_median(expected_D),
            measured_s=_median(measured_D),
            measured_over_expected=_median(ratio_D),
            down=self._way("down", mine_D, dilation_D),
            up=self._way("up", mine_D, dilation_D),
        )

    def _way(self, way: str, mine_D: NDArray[np.bool_], dilation_D: Floats) -> Way:
        bound_D = self._column("clock_bound_ns")[mine_D] / 1e9 / dilation_D
        one_way_D = np.where(np.isnan(bound_D), np.nan, self._column(f"{way}_ns")[mine_D] / 1e9 / dilation_D)
        with np.errstate(divide="ignore", invalid="ignore"):
            rate_D = np.where(one_way_D > 0, 8 * self._column(f"bytes_{way}")[mine_D] / one_way_D, np.nan)
        bound_D = np.where(np.isnan(one_way_D), np.nan, bound_D)
        asked_D = self._column(f"asked_{way}_bits_per_s")[mine_D]
        return Way(*(_median(value_D) for value_D in (asked_D, rate_D, one_way_D, bound_D)))

    def _per_second(self) -> tuple[float | None, float | None]:
        """Rounds and tokens, from the first request of the oldest round to the first one of the newest."""
        sent_QN = self._column("bs_sent_ns").reshape(-1, self._devices)
        began_Q = np.where(np.isnan(sent_QN), np.inf, sent_QN).min(axis=1)
        sent_Q = np.isfinite(began_Q)
        began_S, token_S = began_Q[sent_Q], self._column("tokens")[:: self._devices][sent_Q]
        if len(began_S) < 2 or began_S[-1] <= began_S[0]:
            return None, None
        seconds = (began_S[-1] - began_S[0]) / 1e9
        layers = len(np.unique(self._table["layer"].to_numpy()))
        return float((len(began_S) - 1) / seconds), float(token_S[:-1].sum() / layers / seconds)

    def _column(self, name: str) -> Floats:
        if name not in self._table.column_names:
            return np.full(len(self._table), np.nan)
        values: Floats = self._table[name].to_numpy().astype(float)
        return values


def _median(value_V: Floats) -> float | None:
    return _quantile(value_V, 0.5)


def _quantile(value_V: Floats, share: float) -> float | None:
    known_V = value_V[~np.isnan(value_V)]
    return float(np.quantile(known_V, share)) if len(known_V) else None
