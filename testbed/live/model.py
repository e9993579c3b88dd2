"""A run file's testbed as a model to call: its experts are on the nodes, every round of it is measured and logged.

>>> with live_model(config, config_path=file, out=None, insecure=False) as live:
...     live.begin_prompt()
...     live.model.generate(**live.tokenizer("def ", return_tensors="pt").to(live.model.device))
...     live.settle()
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.config import RunConfig
from testbed.experiment.run import make_policies
from testbed.experiment.setup import add_facts, labels, standing_testbed
from testbed.policies.base import Policy

if TYPE_CHECKING:
    from testbed.experiment.base_station import BaseStation
    from testbed.live.clock import LiveClock

FLUSH_EVERY_S = 1.0


@contextmanager
def live_model(
    config: RunConfig,
    *,
    config_path: Path,
    out: Path | None,
    insecure: bool,
    policies: Sequence[Policy] | None = None,
    text: str = "prompts of a user",
) -> Iterator[LiveModel]:
    """Stand up the run file's testbed and hand out its model; all that was started is stopped again.

    `policies` stand in for those that the run file describes, one for each. `text` says in the manifest where the
    prompts come from. Must be entered, used and left by one thread. Raises WdmoeError for what a user can mend.
    """
    policies = make_policies(config) if policies is None else list(policies)
    with standing_testbed(config, policies, config_path=config_path, out=out, insecure=insecure) as (station, run_dir):
        from testbed.live.clock import LiveClock  # noqa: PLC0415 - torch is loaded while the nodes start

        asked = config.model_dump(mode="json", by_alias=True, exclude={"workload"})  # which was not worked on
        add_facts(run_dir, config=asked, text=text)
        live = LiveModel(
            station,
            run_dir,
            labels(config, policies),
            LiveClock(station.model, station.session),
            emulated=config.radio is not None or any(device.emulated_flops_per_s for device in config.devices),
        )
        try:
            yield live
        finally:
            live.settle()


class LiveModel:
    """Belongs to the thread that opened it. Its first prompt is number 0 of policy 0."""

    def __init__(
        self, base_station: BaseStation, run_dir: Path, policy_labels: list[str], clock: LiveClock, *, emulated: bool
    ) -> None:
        """`emulated`: links or devices are played, so that `clock` counts emulated time."""
        self._base_station, self.run_dir, self.labels = base_station, run_dir, policy_labels
        self.clock, self.emulated = clock, emulated
        self.model: Any = base_station.model
        self.tokenizer: Any = base_station.tokenizer
        self.policy = 0
        self._next_prompt = [0] * len(policy_labels)
        self._flushed_s, self._unflushed = time.monotonic(), True

    def use_policy(self, index: int) -> None:
        """Let `labels[index]` choose from now on. Its prompts are counted by themselves, so that prompt n of every
        policy meets the same channel; over emulated links the first policy has to have had as many of them.
        """
        self.settle()
        self._base_station.use_policy(index)
        self.policy = index

    def begin_prompt(self) -> int:
        """Channel and nodes move on to the next prompt, whose number is returned: the log's rows carry it."""
        self.settle()
        prompt = self._next_prompt[self.policy]
        self._next_prompt[self.policy] += 1
        self._base_station.begin(self.policy, prompt)
        return prompt

    def settle(self) -> None:
        """Learn from the last round and write its rows: when a prompt is done."""
        self._base_station.session.settle()
        self._unflushed = True

    def event(self, kind: str, **facts: Any) -> None:
        """A line in events.jsonl."""
        self._base_station.recorder.event(kind, **facts)

    def idle(self) -> None:
        """Hear and answer the nodes, bring rows to the disk: about every 100 ms while nothing is computed."""
        self._base_station.idle()
        if self._unflushed and time.monotonic() - self._flushed_s > FLUSH_EVERY_S:
            self._base_station.recorder.flush()
            self._flushed_s, self._unflushed = time.monotonic(), False

    def nodes_available(self) -> int:
        return sum(node.available for node in self._base_station.nodes)
