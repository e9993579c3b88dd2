"""What a policy was given in every round of a recorded run, and what it answered: read back from the log.

R rounds, N devices, T tokens, K experts chosen for each, E experts, W ways (down, up).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from testbed.errors import ConfigError, RunLogError
from testbed.policies.bandwidth import rates_bits_per_s
from testbed.policies.base import Air, BoolArray, FloatArray, IntArray, Routing, State
from testbed.runlog.reader import read_events, read_manifest, read_table
from testbed.runlog.schema import Status
from testbed.wire.quantization import scheme_named

Floats = NDArray[np.float64]
OF_POLICY = ("name", "bandwidth", "period")  # keys of a [[policy]] that are no parameters
STATE_COLUMNS = ("token_s", "available", "age_s", "base_s", "expert_s", "row_s")


@dataclass(frozen=True, slots=True)
class Log:
    """A run as it was read, without rounds that a killed run, a power cut or a full disk left in part."""

    run_dir: Path
    manifest: Mapping[str, Any]
    events: list[dict[str, Any]]
    rounds: pa.Table
    tokens: pa.Table
    left_out: int  # rounds of which not every token is there

    @property
    def devices(self) -> list[str]:
        return list(self.manifest["devices"])

    @property
    def radio(self) -> Mapping[str, Any]:
        """The run's emulated channel; empty where links were as they are."""
        return self.manifest["config"].get("radio") or {}

    @property
    def scores(self) -> str:
        """How the gate's scores were kept: float16, float32 or none."""
        kept = "score" in self.tokens.column_names
        return str(self.manifest["config"].get("log", {}).get("scores", "float16")) if kept else "none"


class RecordedRound(NamedTuple):
    """One MoE block. What the policy was given, what it answered, and what came of it."""

    prompt: int
    phase: int
    routing: Routing
    state: State
    expert_TK: IntArray  # asked: the gate's own unless the policy substitutes
    device_TK: IntArray
    arrived_TK: BoolArray
    final_TK: FloatArray


@dataclass(frozen=True, slots=True)
class RecordedPolicy:
    """All rounds of one policy of a run, in their order. `rounds` has N rows for each, device after device."""

    index: int
    label: str
    spec: Mapping[str, Any]  # its table in the run file
    rounds: pa.Table
    blocks: list[RecordedRound]
    no_air: str | None  # why nothing is known of the band that was shared out; None: it is, or there was none

    @property
    def prompt_R(self) -> IntArray:
        return np.array([block.prompt for block in self.blocks])

    @property
    def phase_R(self) -> IntArray:
        return np.array([block.phase for block in self.blocks])

    def of_rounds(self, name: str) -> NDArray[Any]:
        """A column of `rounds` as an array of shape RN."""
        values: NDArray[Any] = self.rounds[name].to_numpy()
        return values.reshape(len(self.blocks), -1)

    @property
    def measured_s_R(self) -> Floats:
        """Seconds that each round really took; emulated ones, dilation taken out, where times were stretched."""
        measured_s_R: Floats = self.of_rounds("round_ns")[:, 0] / self.of_rounds("dilation")[:, 0] / 1e9
        return measured_s_R

    @property
    def answered_R(self) -> BoolArray:
        """Rounds in which all that were asked have answered, or were not waited for because the policy said so."""
        worst_R = self.of_rounds("status").max(axis=1)
        ends_early = self.spec["name"] == "drop_late"
        return np.asarray((worst_R >= Status.ANSWERED) & (worst_R <= (Status.LATE if ends_early else Status.ANSWERED)))


def read_log(run_dir: Path) -> Log:
    """A run's log, whole or left behind by a killed process. Raises RunLogError."""
    manifest, rounds = read_manifest(run_dir), read_table(run_dir, "rounds")
    if "dilation" not in rounds.column_names:  # runs before that stretched no time
        rounds = rounds.append_column("dilation", pa.array(np.ones(rounds.num_rows, np.float32)))
    whole = rounds.num_rows - rounds.num_rows % len(manifest["devices"])
    rounds, tokens = rounds.slice(0, whole), read_table(run_dir, "tokens")
    known_R = _all_tokens_known(rounds, tokens)
    left_out = int((~known_R).sum()) // len(manifest["devices"])
    rounds = rounds.filter(pa.array(known_R)) if left_out else rounds
    return Log(run_dir, manifest, read_events(run_dir), rounds, tokens, left_out)


def _all_tokens_known(rounds: pa.Table, tokens: pa.Table) -> BoolArray:
    """Per row of `rounds`."""
    number_T, number_R = tokens["round"].to_numpy(), rounds["round"].to_numpy()
    first_R, end_R = (np.searchsorted(number_T, number_R, side) for side in ("left", "right"))
    return np.asarray(end_R - first_R == rounds["tokens"].to_numpy())


def recorded_policy(log: Log, index: int) -> RecordedPolicy:
    """The rounds of policy `index`. Raises ConfigError where the run has no such policy, RunLogError where it has none
    of its rounds whole."""
    labels = log.manifest["policies"]
    if not 0 <= index < len(labels):
        known = ", ".join(f"{number} {label}" for number, label in enumerate(labels))
        raise ConfigError(f"--of {index}: {log.run_dir.name} has no such policy; it has {known}")
    rounds = log.rounds.filter(pc.equal(log.rounds["policy"], index))
    if not rounds.num_rows:
        raise RunLogError(
            f"{log.run_dir}: no round of policy {index} ({labels[index]}) was recorded whole; name another"
        )
    no_air = _why_no_air(log, rounds)
    blocks = _blocks(log, rounds, log.tokens.filter(pc.equal(log.tokens["policy"], index)), no_air is None)
    return RecordedPolicy(index, labels[index], log.manifest["config"]["policy"][index], rounds, blocks, no_air)


def _blocks(log: Log, rounds: pa.Table, tokens: pa.Table, with_air: bool) -> list[RecordedRound]:
    devices = len(log.devices)
    head = {name: rounds[name].to_numpy()[::devices] for name in ("round", "prompt", "phase", "layer", "tokens")}
    matrix = {name: _matrix(tokens, name) for name in ("expert", "weight", "kept", "device", "final_weight")}
    matrix["asked"] = _matrix(tokens, "asked") if "asked" in tokens.column_names else matrix["expert"]
    score_PE = _matrix(tokens, "score") if log.scores != "none" else None
    holds_NE = _holds(log)
    states = _states(log, rounds, with_air)
    first_R = np.searchsorted(tokens["round"].to_numpy(), head["round"])
    blocks = []
    for r, (first, count) in enumerate(zip(first_R.tolist(), head["tokens"].tolist(), strict=True)):
        mine = slice(first, first + count)
        score_TE = None if score_PE is None or np.isnan(score_PE[mine]).all() else score_PE[mine]
        expert_TK = matrix["expert"][mine].astype(np.int64)
        routing = Routing(int(head["layer"][r]), expert_TK, matrix["weight"][mine], holds_NE, score_TE)
        blocks.append(
            RecordedRound(
                int(head["prompt"][r]), int(head["phase"][r]), routing, states[r],
                matrix["asked"][mine].astype(np.int64), matrix["device"][mine].astype(np.int64),
                matrix["kept"][mine], matrix["final_weight"][mine],
            )
        )  # fmt: skip
    return blocks


def _matrix(tokens: pa.Table, name: str) -> NDArray[Any]:
    values: NDArray[Any] = pc.list_flatten(tokens[name]).to_numpy()
    return values.reshape(tokens.num_rows, -1)


def _holds(log: Log) -> BoolArray:
    """holds_NE as the run file placed the experts. An id beyond those ever asked is the gate's way to say "none"."""
    placement, names = log.manifest["config"].get("placement"), log.devices
    if log.scores != "none":
        experts = log.tokens.schema.field("score").type.list_size
    else:
        asked = log.tokens["asked" if "asked" in log.tokens.column_names else "expert"]
        sent_P = pc.list_flatten(log.tokens["device"]).to_numpy() >= 0
        experts = int(pc.list_flatten(asked).to_numpy()[sent_P].max(initial=0)) + 1
    if placement is None:
        return np.asarray(np.arange(experts) % len(names) == np.arange(len(names))[:, None])
    return np.array([np.isin(np.arange(experts), placement.get(name, [])) for name in names])


def _states(log: Log, rounds: pa.Table, with_air: bool) -> list[State]:
    of_RN = {name: rounds[f"state_{name}"].to_numpy().reshape(-1, len(log.devices)) for name in STATE_COLUMNS}
    airs = _airs(log, rounds) if with_air else [None] * len(of_RN["token_s"])
    states = [State(*(of_RN[name][r] for name in STATE_COLUMNS)) for r in range(len(airs))]
    return [replace(state, air=air) for state, air in zip(states, airs, strict=True)]


def _why_no_air(log: Log, rounds: pa.Table) -> str | None:
    if "bandwidth_hz" not in rounds.column_names:
        return "this run is older than the columns that tell what the links carried" if log.radio else None
    if log.manifest["config"].get("shaping"):
        return "where rates are shaped the log does not keep how long a row is on the air"
    return None


def _airs(log: Log, rounds: pa.Table) -> list[Air] | list[None]:
    """What the base station knew of the links: the snr_hz under which Eq. 2 gives the rate that it counted on for the
    band that each device had. Kept in single precision, hence right to about 1e-6."""
    devices = len(log.devices)
    if "bandwidth_hz" not in rounds.column_names or rounds["bandwidth_hz"].null_count == rounds.num_rows:
        return [None] * (rounds.num_rows // devices)
    names = ("bandwidth_hz", "asked_down_bits_per_s", "asked_up_bits_per_s")
    band_hz_RN, *rate_WRN = (rounds[name].to_numpy().reshape(-1, devices).astype(float) for name in names)
    snr_hz_RWN = np.stack([band_hz_RN * np.expm1(rate / band_hz_RN * np.log(2)) for rate in rate_WRN], axis=1)
    bandwidth_hz = float(log.radio["bandwidth_hz"])
    row_bits_W1 = 8 * np.array(row_bytes(log))[:, None]
    even_N = np.full(devices, 1 / devices)
    airs = [Air(bandwidth_hz, snr_hz_WN, np.full_like(snr_hz_WN, np.nan)) for snr_hz_WN in snr_hz_RWN]
    return [Air(bandwidth_hz, air.snr_hz_WN, row_bits_W1 / rates_bits_per_s(air, even_N)) for air in airs]


def row_bytes(log: Log) -> tuple[int, int]:
    """What a row weighs on the wire, down and up: the emulated width, or as the log's messages grew with their rows."""
    wire, width = log.manifest["config"]["wire"], log.manifest["config"]["emulation"]["as_if_width"]
    if width:
        return scheme_named(wire["down"]).row_bytes(width), scheme_named(wire["up"]).row_bytes(width)
    down, up = (round(float(per_C[0])) for per_C in bytes_per_row_expert_block(log))
    return down, up


def bytes_per_row_expert_block(log: Log) -> tuple[Floats, Floats]:
    """How the bytes of a block grow, down and up: per row, per expert, and what is left, by least squares."""
    answered = log.rounds.filter(pc.equal(log.rounds["status"], int(Status.ANSWERED)))
    if not answered.num_rows:
        raise RunLogError(f"{log.run_dir}: no device has answered in this run; there is nothing to replay")
    rows_B, experts_B = (answered[name].to_numpy().astype(float) for name in ("rows", "experts_touched"))
    grows_BC = np.column_stack([rows_B, experts_B, np.ones(len(rows_B))])
    down, up = (
        np.linalg.lstsq(grows_BC, answered[name].to_numpy().astype(float), rcond=None)[0]
        for name in ("bytes_down", "bytes_up")
    )
    return down, up
