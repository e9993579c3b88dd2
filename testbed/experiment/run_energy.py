"""Energy of a run, per policy: measured where boards report power, modelled where devices and links are emulated.

Tokens are those that a policy's workload put through the model, prefill and decode together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from testbed.experiment.energy import MeasuredEnergy, Power, idle_power_w, measured_energy
from testbed.latency.energy import block_energy_j
from testbed.wire.figures import BOARD_INTERVAL_S

Facts = Mapping[str, Any]
Floats = NDArray[np.float64]
Span = tuple[int, int]
WAYS = ("down", "up")


class Board(NamedTuple):
    """A board that reports power. None: not known."""

    rail: str | None  # that carries the total; "sum" where its rails were added up
    idle_w: float | None  # before the first round
    idle_samples: int  # that were taken until then
    energy: list[MeasuredEnergy | None]  # of each policy

    def at_rest(self) -> dict[str, Any]:
        """For machines."""
        return {"rail": self.rail, "idle_w": self.idle_w, "idle_samples": self.idle_samples}


class JoulePerToken(NamedTuple):
    """Of one policy; None where nothing tells, and likewise each value."""

    measured: dict[str, float | None] | None  # by device, above idle
    modelled: dict[str, float | None] | None  # down, compute, up, total; of all devices


def joule_per_token(
    rounds: pa.Table, manifest: Facts, events: Sequence[Facts], boards: Mapping[str, Board]
) -> list[JoulePerToken]:
    """Of each policy; `boards` are what `measured_boards` found."""
    modelled = modelled_energy(rounds, manifest, events)
    return [
        JoulePerToken(
            _measured_per_token(manifest["devices"], boards, index, _tokens(_only(rounds, index))),
            _modelled_per_token(joule, _tokens(_only(rounds, index))),
        )
        for index, joule in enumerate(modelled)
    ]


def measured_boards(rounds: pa.Table, manifest: Facts, events: Sequence[Facts]) -> dict[str, Board]:
    """What every board that reported power drew under each policy, from its first request to its last reply.

    Without those whose power is not the device's: of an emulated device (compute padded, or links emulated) it would be
    this machine's, as it would of nodes that are processes of the base station's own machine.
    """
    config = manifest["config"]
    if config["radio"] or config.get("fleet", {}).get("start") != "none":
        return {}
    spans = [_span(_only(rounds, index)) for index in range(len(config["policy"]))]
    interval_s = max(BOARD_INTERVAL_S, config["timeouts"]["heartbeat_s"])  # a heartbeat carries one sample
    real = [name for name in manifest["devices"] if name not in manifest["emulated"]]
    boards = {name: _board([e for e in events if e.get("device") == name], spans, interval_s) for name in real}
    return {name: board for name, board in boards.items() if board is not None}


def _board(events: Sequence[Facts], spans: Sequence[Span | None], interval_s: float) -> Board | None:
    samples = {event["sampled_ns"]: event["power_w"] for event in events if event["kind"] == "power"}
    if not samples:
        return None
    time_ns = sorted(samples)
    power = Power.of(time_ns, [samples[stamp_ns] for stamp_ns in time_ns], interval_s)
    rails = [event["rail"] for event in events if event["kind"] == "power_rail"]
    busy = [span for span in spans if span is not None]
    first_ns = min((start_ns for start_ns, _ in busy), default=time_ns[-1] + 1)
    idle_w = idle_power_w(power, [first_ns], [first_ns], settle_s=np.inf)
    energy = [None if span is None else measured_energy(power, *span, idle_w) for span in spans]
    return Board(rails[-1] if rails else None, idle_w, int((power.time_ns_S < first_ns).sum()), energy)


def modelled_energy(rounds: pa.Table, manifest: Facts, events: Sequence[Facts]) -> list[dict[str, float | None]]:
    """J of each policy by the model: down_j, compute_j and up_j of all its rounds; None where a figure is not known.

    Powers are the run file's, of [radio] where it draws the channel: a trace says nothing of them. Rates are those that
    bandwidth was asked for, else the prompt's channel's. Rows sent count as computed, also where no reply came.
    """
    config = manifest["config"]
    radio = config["radio"] if config["radio"] and not config["radio"].get("trace") else {}
    energy = block_energy_j(
        rows_N=rounds["rows"].to_numpy(),
        bytes_WN=[rounds[f"bytes_{way}"].to_numpy() for way in WAYS],
        rate_bits_per_s_WN=[_rate_bits_per_s(rounds, events, way) for way in WAYS],
        station_power_w=radio.get("station_power_w", np.nan),
        device_power_w=radio.get("device_power_w", np.nan),
        flop_per_row=_flop_per_row(manifest),
        joule_per_flop_N=_joule_per_flop(manifest)[rounds["device"].to_numpy()],
    )
    policy = rounds["policy"].to_numpy()
    parts = {"down_j": energy.down_j_N, "compute_j": energy.compute_j_N, "up_j": energy.up_j_N}
    return [
        {name: _known(joule[policy == index].sum()) for name, joule in parts.items()}
        for index in range(len(config["policy"]))
    ]


def _rate_bits_per_s(rounds: pa.Table, events: Sequence[Facts], way: str) -> Floats:
    """Of every row's link, without dilation; NaN where no channel was emulated."""
    device, policy, prompt = (rounds[name].to_numpy() for name in ("device", "policy", "prompt"))
    rate = np.full(rounds.num_rows, np.nan)
    for event in events:
        if event["kind"] == "channel" and f"{way}_bits_per_s" in event:
            mine = (policy == event["policy"]) & (prompt == event["prompt"])
            rate[mine] = np.array(event[f"{way}_bits_per_s"])[device[mine]]
    if (asked_name := f"asked_{way}_bits_per_s") in rounds.column_names:
        asked = rounds[asked_name].to_numpy()
        rate = np.where(np.isnan(asked), rate, asked)
    return rate


def _joule_per_flop(manifest: Facts) -> Floats:
    given = {device["name"]: device.get("joule_per_flop") for device in manifest["config"].get("device", ())}
    return np.array([given.get(name) for name in manifest["devices"]], float)


def _flop_per_row(manifest: Facts) -> float:
    """Eq. 4, out of what a device plays: its seconds per row times its FLOP/s. NaN where none plays another."""
    for device in manifest["config"].get("device", ()):
        played, flops_per_s = manifest["emulated"].get(device["name"]), device.get("emulated_flops_per_s")
        if played is not None and flops_per_s is not None:
            return float(played["row_s"] * flops_per_s)
    return float("nan")


def _measured_per_token(
    devices: Sequence[str], boards: Mapping[str, Board], policy: int, tokens: int
) -> dict[str, float | None] | None:
    if not boards:
        return None
    energies = {name: boards[name].energy[policy] if name in boards else None for name in devices}
    return {name: None if energy is None else energy.joule_per_token(tokens) for name, energy in energies.items()}


def _modelled_per_token(joule: Mapping[str, float | None], tokens: int) -> dict[str, float | None] | None:
    parts = list(joule.values())
    if tokens == 0 or all(part is None for part in parts):
        return None
    total = _known(sum(np.nan if part is None else part for part in parts))
    named = {**{name.removesuffix("_j"): part for name, part in joule.items()}, "total": total}
    return {name: None if part is None else part / tokens for name, part in named.items()}


def _tokens(rounds: pa.Table) -> int:
    """Counted where each is seen once: in the first layer's rounds, in one device's rows, at the first try."""
    once = pc.and_(pc.equal(rounds["layer"], 0), pc.and_(pc.equal(rounds["device"], 0), pc.equal(rounds["attempt"], 0)))
    return int(pc.sum(rounds.filter(once)["tokens"]).as_py() or 0)


def _span(rounds: pa.Table) -> Span | None:
    """From the first request to the last reply; None where there was none of either."""
    first_ns, last_ns = pc.min(rounds["bs_sent_ns"]).as_py(), pc.max(rounds["bs_received_ns"]).as_py()
    return None if first_ns is None or last_ns is None or last_ns <= first_ns else (first_ns, last_ns)


def _only(table: pa.Table, policy: int) -> pa.Table:
    return table.filter(pc.equal(table["policy"], policy))


def _known(joule: float) -> float | None:
    return float(joule) if np.isfinite(joule) else None
