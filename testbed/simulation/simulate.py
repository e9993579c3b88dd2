"""One simulation: every policy of a run file over many draws of its channel, without sockets and without waiting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from testbed.checkpoint.manifest import Manifest
from testbed.config import RunConfig
from testbed.errors import ConfigError
from testbed.experiment.emulation import row_bytes
from testbed.experiment.model_split import split_model
from testbed.policies.loading import label, make_policy
from testbed.simulation.allocation import Allocation
from testbed.simulation.draws import Draws, check_simulable, draw_channel, draw_placements
from testbed.simulation.montecarlo import Simulated, is_quick, simulate_policy
from testbed.simulation.quality import ModelInProcess
from testbed.simulation.results import SimulatedPolicy, SimulationResults, policy_row
from testbed.simulation.routing import RoutedBlock, pack, recorded_blocks

QUICK_DRAWS, SLOW_DRAWS = 10_000, 200
Progress = Callable[[str, int, int], None]  # policy, draws done, draws


def simulate(
    config: RunConfig,
    *,
    draws: int,
    placements: int = 1,
    quality: bool = True,
    routing: Path | None = None,
    progress: Progress | None = None,
) -> SimulationResults:
    """What each policy of the run file would take, by Eq. 6 in `draws` draws of the channel, and what it would cost.

    placements: the draws are spread over so many, each with seeds of its own (`draws.draw_placements`). quality:
    whether the model is really run under each policy, too. routing: a recorded run whose gate's choices are used; None:
    the checkpoint's own gate chooses. Raises WdmoeError for what a user can mend.
    """
    check_simulable(config)
    if not 1 <= placements <= draws:
        raise ConfigError(f"--draws {draws}: each of {placements} placements needs at least one")
    policies = [make_policy(spec.name, spec.params) for spec in config.policies]
    split_dir, manifest = split_model(config)
    prompts = max(1, config.workload.score_prompts)
    channels = draw_placements(config, manifest, draws // placements, placements, prompts)
    own_channel = draw_channel(config, manifest, prompts, prompts)  # what each prompt of a run meets
    model = ModelInProcess(config, split_dir, manifest) if quality or routing is None else None
    blocks = _routing(routing, manifest, model, own_channel)
    packed = pack(blocks)
    rows: list[SimulatedPolicy] = []
    reference: list[Simulated] = []
    for spec, policy in zip(config.policies, policies, strict=True):
        allocation = Allocation.of(spec)
        count = _Counter(
            label(policy.name, policy.params, spec.bandwidth, spec.period), placements * len(channels[0]), progress
        )
        simulated = [simulate_policy(policy, allocation, blocks, packed, channel, count) for channel in channels]
        reference = reference or simulated
        found = model.score(policy, allocation, own_channel) if quality and model is not None else None
        about = {
            "policy": spec.name, "params": spec.params, "bandwidth": allocation.bandwidth, "period": allocation.period
        }  # fmt: skip
        rows.append(policy_row(about, simulated, reference, packed, row_bytes(config, manifest), found))
    return SimulationResults(config.name, describe(config, blocks, routing, channels, quality), rows)


def default_draws(config: RunConfig) -> int:
    """As many as take seconds: of what is compiled many, and few where one policy is not. All meet the same draws."""
    quick = all(is_quick(make_policy(spec.name, spec.params), Allocation.of(spec)) for spec in config.policies)
    return QUICK_DRAWS if quick else SLOW_DRAWS


def _routing(
    run_dir: Path | None, manifest: Manifest, model: ModelInProcess | None, channel: Draws
) -> list[RoutedBlock]:
    """From a recorded run, or from the gate itself."""
    if run_dir is not None:
        return recorded_blocks(run_dir, manifest)
    return [] if model is None else model.routing(channel)


def describe(
    config: RunConfig, blocks: Sequence[RoutedBlock], run_dir: Path | None, channels: Sequence[Draws], quality: bool
) -> dict[str, Any]:
    """What one must know to understand the rows."""
    return {
        "latency": "simulated",
        "perplexity_from": "measured in process" if quality else None,
        "routing": "the checkpoint's own gate" if run_dir is None else f"recorded in {run_dir.name}",
        "fading": config.radio.fading if config.radio is not None and config.radio.trace is None else None,
        "compute": config.emulation.compute,
        "medium": config.radio.medium if config.radio is not None else None,
        "devices": len(config.devices),
        "blocks": len(blocks),
        "tokens": sum(len(block.routing.expert_TK) for block in blocks),
        "draws": sum(len(channel) for channel in channels),
        "placements": len(channels),
        "interval": f"95 %, bootstrap over {'placements' if len(channels) > 1 else 'draws'}, paired",
    }


class _Counter:
    """Adds up the draws that are done."""

    def __init__(self, policy: str, total: int, progress: Progress | None) -> None:
        self._policy, self._total, self._done = policy, total, 0
        self._progress = progress or (lambda *_: None)

    def __call__(self, more: int) -> None:
        self._done += more
        self._progress(self._policy, self._done, self._total)
