"""`testbed logs replay`: what another policy would have done in a run, and whether such an answer can be believed."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from testbed.cli.logs import DEFAULT_LOGS, JsonOption, LogsOption, RunArgument

if TYPE_CHECKING:
    from rich.table import Table

    from testbed.runlog.replay_results import ReplayResults
    from testbed.runlog.replay_validation import Validation

EXAMPLE = "Example: testbed logs replay latest --policy wlr --param theta=0.3"


def command(
    run: RunArgument = "latest",
    policy: Annotated[
        str | None,
        typer.Option(help="The policy to ask: a built-in name, or package.module:Class.", show_default=False),
    ] = None,
    params: Annotated[
        list[str] | None, typer.Option("--param", metavar="KEY=VALUE", help="A parameter of it; repeatable.")
    ] = None,
    of: Annotated[int, typer.Option(min=0, help="The policy of the run whose rounds are replayed, by number.")] = 0,
    bandwidth: Annotated[
        Literal["even", "proportional", "optimal"], typer.Option(help="How the band is shared out.")
    ] = "even",
    period: Annotated[Literal["block", "prompt", "static"], typer.Option(help="When the shares are made.")] = "block",
    validate: Annotated[
        bool, typer.Option("--validate", help="Instead: replay the run's own policies; exit code 1 where they differ.")
    ] = False,
    logs: LogsOption = DEFAULT_LOGS,
    as_json: JsonOption = False,
) -> None:
    """Ask another policy in the recorded rounds: what it would keep, who would get how much, how long blocks take."""
    from testbed.errors import ConfigError

    if validate == (policy is not None):
        raise ConfigError("logs replay: name either a --policy to replay, such as wlr, or --validate")
    if validate and (params or bandwidth != "even" or period != "block"):
        raise ConfigError("logs replay --validate: replays policies as they were run; leave out --param and the band")
    if bandwidth == "even" and period != "block":
        raise ConfigError('--period: without effect while the band is shared evenly; add "--bandwidth optimal"')
    given = dict(_parameter(param) for param in params or ())

    from testbed.cli.output import console, print_json_line
    from testbed.policies.loading import make_policy
    from testbed.runlog.catalog import find_run
    from testbed.runlog.replay_inputs import read_log, recorded_policy
    from testbed.runlog.replay_results import replay
    from testbed.runlog.replay_validation import validate as validated

    results: ReplayResults | Validation
    if policy is None:
        results = validated(read_log(find_run(run, logs)), of)
        shown = [_reproduced_table(results), _predicted_table(results)]
        notes = _validation_notes(results)
        failed = not (results.reproduces and results.predicts)
    else:
        asked = make_policy(policy, given)
        log = read_log(find_run(run, logs))
        results = replay(log, recorded_policy(log, of), asked, bandwidth, period)
        shown, notes, failed = [_kept_table(results), _times_table(results), _rows_table(results)], results.notes, False
    if as_json:
        print_json_line(results.document())
    else:
        for table in shown:
            console().print(table)
        for note in notes:
            console().print(note, soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def _parameter(text: str) -> tuple[str, Any]:
    from testbed.errors import ConfigError

    key, separator, value = text.partition("=")
    if not (key and separator):
        raise ConfigError(f"--param {text}: write KEY=VALUE, such as theta=0.3")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _kept_table(results: ReplayResults) -> Table:
    from testbed.cli.output import table

    rows = [
        [
            phase.phase, str(phase.prompts), str(phase.rounds),
            _percent(phase.recorded_kept_fraction), _percent(phase.kept_fraction),
            _percent(phase.recorded_dropped_mass), _percent(phase.dropped_mass),
        ]
        for phase in results.phases
    ]  # fmt: skip
    columns = [
        "phase",
        "prompts",
        "rounds",
        "pairs kept\nrecorded",
        "\nreplayed",
        "mass dropped\nrecorded",
        "\nreplayed",
    ]
    return table(f"{results.label}, replayed on {results.recorded} of {results.run}", columns, rows)


def _times_table(results: ReplayResults) -> Table:
    from testbed.cli.output import table

    rows = [
        [
            phase.phase, _BY[cut.by], str(cut.rounds), _ms(phase.measured_p50_s), _ms(cut.recorded_p50_s),
            _ms(cut.replayed_p50_s), _interval(cut.cut, cut.cut_low, cut.cut_high),
            _interval(cut.cut_of_measured, cut.cut_of_measured_low, cut.cut_of_measured_high),
        ]
        for phase in results.phases
        for cut in phase.predicted
    ]  # fmt: skip
    columns = ["phase", "predicted by", "rounds", "recorded, ms/block\nmeasured p50", "\npredicted p50",
               "replayed\npredicted p50", "cut, of predicted\n(95 %)", "cut, of measured\n(95 %)"]  # fmt: skip
    return table(f"Recorded times: {results.times_are}", columns, rows)


def _rows_table(results: ReplayResults) -> Table:
    from testbed.cli.output import table

    devices = list(results.phases[0].rows_per_round)
    rows = [
        [
            device,
            *(
                f"{rows[device]:.1f}"
                for phase in results.phases
                for rows in (phase.recorded_rows_per_round, phase.rows_per_round)
            ),
        ]
        for device in devices
    ]
    columns = [f"{phase.phase}\n{which}" for phase in results.phases for which in ("recorded", "replayed")]
    return table("Rows per block, mean", ["device", *columns], rows)


def _reproduced_table(results: Validation) -> Table:
    from testbed.cli.output import table

    rows = [
        [row.policy, *(["-"] * 5)] if row.refused is not None else [
            row.policy, str(row.rounds), str(row.same), str(row.same_weights),
            "-" if row.same_shares is None else str(row.same_shares), "yes" if row.exact_inputs else "no",
        ]
        for row in results.reproduced
    ]  # fmt: skip
    columns = [
        "policy",
        "rounds",
        "same pairs\nand devices",
        "same\nweights",
        "same\nshares",
        "all it was given\nis kept",
    ]
    return table(f"Replayed on their own rounds: {results.run}", columns, rows)


def _predicted_table(results: Validation) -> Table:
    """A row for each policy and way to predict."""
    from testbed.cli.output import table

    found = {(row.policy, row.by, row.phase): row for row in results.predicted}
    rows = []
    for policy, by in dict.fromkeys((row.policy, row.by) for row in results.predicted):
        cells = []
        for phase in ("prefill", "decode"):
            row = found.get((policy, by, phase))
            cells += [_ms(row.measured_p50_s), _ms(row.predicted_p50_s), _percent(row.difference_p50)] if row else _NONE
        both = found[policy, by, "both"]
        rows.append([policy, _BY[by], *cells, _percent(both.difference_p50) + (" *" if both.claimed else "  ")])
    of_phase = ["\nreplayed", "\ndifference"]
    columns = ["policy", "predicted by", "prefill, ms/block\nreally run", *of_phase,
               "decode, ms/block\nreally run", *of_phase, "both\ndifference"]  # fmt: skip
    return table(f"Replayed on {results.base}, against really running them; medians over rounds", columns, rows)


def _validation_notes(results: Validation) -> list[str]:
    rows = [row for row in results.reproduced if row.refused is None and row.exact_inputs]
    same, rounds = sum(min(row.same, row.same_weights) for row in rows), sum(row.rounds for row in rows)
    claim = f"the {100 * results.claim:.0f} % that are claimed for each policy (*)"
    return [
        f"policies of which the log keeps all they were given: {same} of {rounds} rounds reproduced to the bit",
        f"predicted times of policies that were also run: {'within' if results.predicts else 'ABOVE'} {claim}",
        *(f"not replayed: {row.policy}: {row.refused}" for row in results.reproduced if row.refused is not None),
        *results.notes,
    ]


_NONE = ["-", "-", "-"]
_BY = {"estimates": "recorded estimates", "channel": "true channel (emulated)"}


def _ms(seconds: float) -> str:
    return "-" if math.isnan(seconds) else f"{1e3 * seconds:.2f}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def _interval(cut: float, low: float, high: float) -> str:
    return _percent(cut) + ("" if math.isnan(low) else f" ({100 * low:.1f} to {100 * high:.1f})")
