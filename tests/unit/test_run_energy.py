"""Energy of a run out of its rows and events. Rows, power samples and channels here are synthetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from testbed.experiment.results import Results, summarise
from testbed.experiment.run_energy import Board, joule_per_token, measured_boards, modelled_energy
from testbed.experiment.table import results_notes
from testbed.latency.model import ComputeModel, expert_flop_per_row
from testbed.runlog.manifest import write_manifest
from testbed.runlog.recorder import Recorder
from testbed.runlog.schema import GenerationPhase, Status

S = 10**9
BOOT_NS = 10**16  # so late that a float cannot tell neighbouring nanoseconds apart
DEVICES = ["near", "far"]
POLICIES = [{"name": "topk"}, {"name": "wlr", "theta": 0.2}]
FIRST_S, LENGTH_S, QUARTER_S = 20, 40, 10  # rest, then each policy's time, of four rounds
TOKENS = 10  # of a prefill
FLOP = expert_flop_per_row(4096, 14336)
RADIO = {"station_power_w": 10.0, "device_power_w": 0.2, "medium": "fdd", "trace": None}


def manifest_of(radio: dict[str, Any] | None = None, start: str = "none", **device: Any) -> dict[str, Any]:
    """device: every device's keys; with emulated_flops_per_s they are padded."""
    flops = device.get("emulated_flops_per_s")
    model = None if flops is None else ComputeModel.paper(FLOP, flops)
    played = {} if model is None else {"base_s": model.base_s, "expert_s": model.expert_s, "row_s": model.row_s}
    return {
        "config": {
            "policy": POLICIES,
            "radio": radio,
            "fleet": {"start": start},
            "timeouts": {"heartbeat_s": 0.5},
            "device": [{"name": name, **device} for name in DEVICES],
            "on_loss": {"invalid_above": 0.01},
        },
        "devices": DEVICES,
        "emulated": dict.fromkeys(DEVICES, played) if played else {},
        "layers": 2,
        "links": "none",
    }


def rows(**columns: Any) -> pa.Table:
    """Two policies, each a prefill and a decode round in both of two layers, in even steps of its time."""
    made = [
        {
            "policy": policy, "prompt": 0, "layer": number % 2, "attempt": 0, "device": device,
            "tokens": TOKENS if number < 2 else 1, "rows": 3, "bytes_down": 1000, "bytes_up": 500,
            "bs_sent_ns": BOOT_NS + (FIRST_S + (4 * policy + number) * QUARTER_S) * S,
            "bs_received_ns": BOOT_NS + (FIRST_S + (4 * policy + number + 1) * QUARTER_S) * S,
        }
        for policy in range(2)
        for number in range(4)
        for device in range(2)
    ]  # fmt: skip
    table = pa.Table.from_pylist(made)
    for name, value in columns.items():
        table = table.append_column(name, pa.array(np.broadcast_to(value, table.num_rows)))
    return table


def power_events(
    device: str, idle_w: float, busy_w: tuple[float, float], rest_s: int = FIRST_S
) -> list[dict[str, Any]]:
    """A sample every second: rest_s of rest, then each policy's power."""
    watts = [idle_w] * rest_s + [busy_w[0]] * LENGTH_S + [busy_w[1]] * (LENGTH_S + 1)
    first_ns = BOOT_NS + (FIRST_S - rest_s) * S
    return [
        {"kind": "power", "device": device, "power_w": power_w, "sampled_ns": first_ns + second * S}
        for second, power_w in enumerate(watts)
    ] + [{"kind": "power_rail", "device": device, "rail": "VDD_IN"}]


def channel(policy: int, down: float, up: float) -> dict[str, Any]:
    return {
        "kind": "channel", "policy": policy, "prompt": 0, "factor": [1.0, 1.0], "token_s": [0.001, 0.001],
        "down_bits_per_s": [down, down / 2], "up_bits_per_s": [up, up / 2],
    }  # fmt: skip


CHANNELS = [channel(0, 8e6, 4e6), channel(1, 16e6, 4e6)]


def test_measured_energy_is_what_a_board_drew_above_rest_in_the_time_of_a_policy() -> None:
    events = power_events("near", 4.0, (6.0, 5.0))
    near = measured_boards(rows(), manifest_of(), events)["near"]
    assert (near.rail, near.idle_w, near.idle_samples) == ("VDD_IN", 4.0, FIRST_S)
    topk, wlr = near.energy
    assert topk is not None
    assert wlr is not None
    assert topk.above_idle_j == pytest.approx(2.0 * LENGTH_S, rel=0.02)
    assert wlr.above_idle_j == pytest.approx(1.0 * LENGTH_S, rel=0.02)


def test_energy_per_token_counts_prefill_and_decode_once_whatever_the_layers() -> None:
    events = power_events("near", 4.0, (6.0, 5.0))
    manifest = manifest_of()
    boards = measured_boards(rows(), manifest, events)
    found = joule_per_token(rows(), manifest, events, boards)
    tokens = TOKENS + 1
    assert found[0].measured == {"near": pytest.approx(80 / tokens, rel=0.02), "far": None}
    assert found[1].measured == {"near": pytest.approx(40 / tokens, rel=0.02), "far": None}
    assert found[0].modelled is None


def test_a_round_that_was_tried_again_has_its_tokens_once() -> None:
    again = rows()
    second = again.set_column(again.column_names.index("attempt"), "attempt", pa.array([1] * again.num_rows))
    events, manifest = power_events("near", 4.0, (6.0, 5.0)), manifest_of()
    boards = measured_boards(again, manifest, events)
    once = joule_per_token(again, manifest, events, boards)
    assert joule_per_token(pa.concat_tables([again, second]), manifest, events, boards) == once


@pytest.mark.parametrize(
    "manifest",
    [
        manifest_of(emulated_flops_per_s=1e12),
        manifest_of(radio=RADIO),
        manifest_of(start="local"),
    ],
    ids=["compute padded", "links emulated", "nodes on this machine"],
)
def test_power_that_would_be_this_machines_is_no_devices_energy(manifest: dict[str, Any]) -> None:
    events = [*power_events("near", 4.0, (6.0, 5.0)), *CHANNELS]
    assert measured_boards(rows(), manifest, events) == {}
    assert all(found.measured is None for found in joule_per_token(rows(), manifest, events, {}))


def test_a_device_that_plays_none_is_measured_beside_one_that_does() -> None:
    manifest = manifest_of()
    manifest["emulated"] = {"far": {"base_s": 0.0, "expert_s": 0.0, "row_s": 0.1}}
    events = power_events("near", 4.0, (6.0, 5.0)) + power_events("far", 4.0, (6.0, 5.0))
    assert list(measured_boards(rows(), manifest, events)) == ["near"]


def test_without_power_nothing_is_measured() -> None:
    assert measured_boards(rows(), manifest_of(), []) == {}


def test_too_little_rest_leaves_the_energy_per_token_unknown_and_says_how_little() -> None:
    events, manifest = power_events("near", 4.0, (6.0, 5.0), rest_s=3), manifest_of()
    boards = measured_boards(rows(), manifest, events)
    assert (boards["near"].idle_w, boards["near"].idle_samples) == (None, 3)
    assert joule_per_token(rows(), manifest, events, boards)[0].measured == {"near": None, "far": None}


def test_samples_out_of_order_or_told_twice_change_nothing() -> None:
    events = power_events("near", 4.0, (6.0, 5.0))
    mixed = [*reversed(events), *events[:9]]
    assert measured_boards(rows(), manifest_of(), mixed) == measured_boards(rows(), manifest_of(), events)


def test_samples_after_the_first_round_are_not_rest() -> None:
    events = power_events("near", 4.0, (6.0, 5.0))
    late = [{**event, "sampled_ns": event["sampled_ns"] + 500 * S} for event in events[:10]]
    assert measured_boards(rows(), manifest_of(), [*events, *late])["near"].idle_w == 4.0


def test_a_policy_whose_requests_nobody_answered_has_no_energy() -> None:
    silent = rows()
    received = pa.array([None if policy else 1 + sent for policy, sent in zip(
        silent["policy"].to_pylist(), silent["bs_sent_ns"].to_pylist(), strict=True)], pa.int64())  # fmt: skip
    silent = silent.set_column(silent.column_names.index("bs_received_ns"), "bs_received_ns", received)
    near = measured_boards(silent, manifest_of(), power_events("near", 4.0, (6.0, 5.0)))["near"]
    assert near.energy[1] is None


def modelled(manifest: dict[str, Any], events: list[dict[str, Any]], **columns: Any) -> list[dict[str, float | None]]:
    return modelled_energy(rows(**columns), manifest, events)


PADDED = {"emulated_flops_per_s": 1e12, "joule_per_flop": 2e-12}


def test_the_model_adds_up_power_over_time_on_the_air_and_energy_per_flop() -> None:
    topk, wlr = modelled(manifest_of(RADIO, "local", **PADDED), CHANNELS)
    assert topk["down_j"] == pytest.approx(4 * 10.0 * (1e-3 + 2e-3))  # four rounds, 1000 bytes to each device
    assert wlr["down_j"] == pytest.approx(4 * 10.0 * (0.5e-3 + 1e-3))
    assert topk["up_j"] == pytest.approx(4 * 0.2 * (1e-3 + 2e-3))
    assert topk["compute_j"] == pytest.approx(8 * 3 * FLOP * 2e-12)


def test_rates_are_those_that_bandwidth_was_asked_for_where_it_was() -> None:
    asked = np.array([80e6] * 8 + [np.nan] * 8)
    topk, wlr = modelled(manifest_of(RADIO, "local", **PADDED), CHANNELS, asked_down_bits_per_s=asked)
    assert topk["down_j"] == pytest.approx(8 * 10.0 * 0.1e-3)
    assert wlr["down_j"] == pytest.approx(4 * 10.0 * (0.5e-3 + 1e-3))


def test_without_energy_per_flop_compute_is_unknown_and_the_radio_is_not() -> None:
    topk, _ = modelled(manifest_of(RADIO, "local", emulated_flops_per_s=1e12), CHANNELS)
    assert topk["compute_j"] is None
    assert topk["down_j"] is not None
    assert topk["up_j"] is not None


def test_compute_is_unknown_of_a_device_whose_speed_the_run_file_does_not_give() -> None:
    """A node that was started elsewhere, and told there what to play."""
    manifest = manifest_of(joule_per_flop=2e-12)
    manifest["emulated"] = {"far": {"base_s": 0.0, "expert_s": 0.0, "row_s": 0.1}}
    assert modelled(manifest, [])[0]["compute_j"] is None


def test_a_trace_says_nothing_of_powers() -> None:
    topk, _ = modelled(manifest_of({**RADIO, "trace": "rates.csv"}, "local", **PADDED), CHANNELS)
    assert (topk["down_j"], topk["up_j"]) == (None, None)
    assert topk["compute_j"] is not None


def test_real_links_and_real_compute_have_no_modelled_energy() -> None:
    manifest = manifest_of()
    assert modelled(manifest, []) == [{"down_j": None, "compute_j": None, "up_j": None}] * 2
    assert all(found.modelled is None for found in joule_per_token(rows(), manifest, [], {}))


def test_a_prompt_without_a_known_channel_leaves_its_policys_radio_energy_unknown() -> None:
    topk, wlr = modelled(manifest_of(RADIO, "local", **PADDED), CHANNELS[:1])
    assert topk["down_j"] is not None
    assert wlr["down_j"] is None


def test_modelled_energy_per_token_has_a_total_only_where_all_its_parts_are_known() -> None:
    known = joule_per_token(rows(), manifest_of(RADIO, "local", **PADDED), CHANNELS, {})[0].modelled
    part = joule_per_token(rows(), manifest_of(RADIO, "local"), CHANNELS, {})[0].modelled
    assert known is not None
    assert part is not None
    assert known["total"] == pytest.approx(sum(known[name] or 0 for name in ("down", "compute", "up")))
    assert known["down"] == pytest.approx(0.12 / (TOKENS + 1))
    assert (part["compute"], part["total"]) == (None, None)
    assert part["down"] == known["down"]


def results_of(folder: Path, manifest: dict[str, Any], events: list[dict[str, Any]]) -> Results:
    """The same rows, out of a run's log."""
    write_manifest(folder, manifest)
    with Recorder(folder, "run", DEVICES, top_k=1, experts=0) as recorder:
        for number, row in enumerate(rows().to_pylist()[::2]):
            own = {name: value for name, value in row.items() if name not in ("device", "tokens")}
            phase = GenerationPhase.PREFILL if row["tokens"] > 1 else GenerationPhase.DECODE
            recorder.record_round(
                {
                    **own, "round": number, "phase": int(phase), "dilation": 1.0, "experts_touched": 1, "parts_down": 1,
                    "parts_up": 1, "status": int(Status.ANSWERED), "round_ns": S, "state_available": True,
                },
                {
                    "expert": [[0]] * row["tokens"], "asked": [[0]] * row["tokens"], "weight": 1.0, "kept": True,
                    "device": 0, "final_weight": 1.0, "orphaned": False,
                },
            )  # fmt: skip
        for event in events:
            recorder.event(**event)
    return summarise(folder)


def test_results_and_their_notes_tell_measured_energy_and_what_was_taken_off(tmp_path: Path) -> None:
    results = results_of(tmp_path, manifest_of(), power_events("near", 4.0, (6.0, 5.0)))
    measured = results.document()["rows"][0]["joule_per_token_measured"]
    assert measured == {"near": pytest.approx(80 / (TOKENS + 1), rel=0.02), "far": None}
    assert results.document()["boards"] == {"near": {"rail": "VDD_IN", "idle_w": 4.0, "idle_samples": FIRST_S}}
    (note,) = [note for note in results_notes(results) if "J per token" in note]
    assert "measured" in note
    assert "near 4.00 W on VDD_IN, 20 samples before the first round" in note
    assert "modelled" not in note


def test_notes_say_of_a_board_without_rest_that_its_idle_power_is_unknown(tmp_path: Path) -> None:
    results = results_of(tmp_path, manifest_of(), power_events("near", 4.0, (6.0, 5.0), rest_s=2))
    assert isinstance(results.boards["near"], Board)
    assert any(
        "near unknown on VDD_IN, 2 samples before the first round, 5 needed" in n for n in results_notes(results)
    )


def test_modelled_energy_is_called_so(tmp_path: Path) -> None:
    results = results_of(tmp_path, manifest_of(RADIO, "local", **PADDED), CHANNELS)
    (note,) = [note for note in results_notes(results) if "J per token" in note]
    assert "modelled, not measured" in note
    assert "down 0.0109 compute" in note
    assert results.rows[0].joule_per_token_measured is None


def test_without_any_energy_there_is_no_line_about_it(tmp_path: Path) -> None:
    results = results_of(tmp_path, manifest_of(), [])
    assert not any("J per token" in note for note in results_notes(results))
    assert results.rows[0].joule_per_token_measured is None
    assert results.rows[0].joule_per_token_modelled is None
    assert results.boards == {}
