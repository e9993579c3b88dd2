"""`testbed logs ls`: which runs there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from testbed.cli.logs import DEFAULT_LOGS, JsonOption, LogsOption

if TYPE_CHECKING:
    from testbed.runlog.catalog import PolicyFigures, Run

EXAMPLE = "Example: testbed logs ls --last 10"


def command(
    logs: LogsOption = DEFAULT_LOGS,
    last: Annotated[int | None, typer.Option(min=1, help="Only so many of the newest.", show_default=False)] = None,
    sum_up: Annotated[
        bool, typer.Option("--sum-up", help="First sum up runs without figures from their rows, and keep that.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List runs, with cut and perplexity per policy. The oldest first; figures as kept when a run was summed up."""
    from testbed.cli.output import console, print_json_line, table
    from testbed.runlog.catalog import describe_run, list_runs

    runs = list_runs(logs)[-last if last else None :]
    notes = []
    if sum_up:
        notes = [_sum_up(run) for run in runs if _lacks_figures(run)]
        runs = [describe_run(run.directory) for run in runs]
    if as_json:
        print_json_line({"logs": str(logs), "runs": [run.document() for run in runs]})
    else:
        shown = table(f"Runs in {logs}", COLUMNS, [_cells(run) for run in runs])
        for column in shown.columns[:FIGURES_FROM]:
            column.justify = "left"
        console().print(shown)
    if any(_lacks_figures(run) for run in runs) and not sum_up:
        notes.append("- for a cut and a perplexity: not summed up yet; --sum-up does it, from the rows")
    notes += [f"{run.run}: INCOMPLETE, rows {run.losses}" for run in runs if run.losses]
    for note in filter(None, [*(run.problem for run in runs), *notes]):
        console(stderr=True).print(note, soft_wrap=True)


COLUMNS = ["run", "state", "model", "channel", "devices,\ncompute", "policy", "prefill cut\n(95 %)", "perplexity"]
FIGURES_FROM = 6


def _lacks_figures(run: Run) -> bool:
    return run.state.value == "finished" and run.kind == "run" and not run.summed_up


def _sum_up(run: Run) -> str | None:
    """Returns why it could not be."""
    from testbed.errors import RunLogError
    from testbed.experiment.results import summarise
    from testbed.runlog.catalog import write_results

    try:
        write_results(run.directory, summarise(run.directory).document())
    except RunLogError as error:
        return str(error)
    except KeyError as error:
        return f"{run.run}: not summed up, its log is older than what the figures need ({error.args[0]})"
    return None


def _cells(run: Run) -> list[str]:
    """The policies stand below each other, and so does what belongs to each."""
    state = run.state.value + (" (probe)" if run.kind == "probe" else "")
    if run.losses:
        state += "\nINCOMPLETE"
    played = "all" if run.emulated_devices == len(run.devices) else run.emulated_devices
    compute = f"{played} emulated" if run.emulated_devices else "measured"
    devices = f"{len(run.devices)}, {compute}" if run.devices else "-"
    columns = zip(*(_policy_cells(policy) for policy in run.policies), strict=True)
    model = (run.model or "-").replace(" (", "\n(")
    channel = (run.channel or "-").replace(", ", "\n")
    return [run.run, state, model, channel, devices, *("\n".join(cells) for cells in columns)]


def _policy_cells(policy: PolicyFigures) -> tuple[str, str, str]:
    name = policy.policy + (" INVALID" if policy.valid is False else "")
    cut = "-" if policy.prefill_cut is None else f"{100 * policy.prefill_cut:.1f} %"
    if policy.prefill_cut_low is not None and policy.prefill_cut_high is not None:
        cut += f" ({100 * policy.prefill_cut_low:.0f} to {100 * policy.prefill_cut_high:.0f})"
    return name, cut, "-" if policy.perplexity is None else f"{policy.perplexity:.3f}"
