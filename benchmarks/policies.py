"""What a policy's decision costs per round: `python benchmarks/policies.py`.

Prints a table of medians; the last line of stdout is one JSON document, in microseconds.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from testbed.policies.base import Air, Policy, Routing, State
from testbed.policies.joint import Joint
from testbed.policies.load_aware import LoadAware
from testbed.policies.topk import TopK
from testbed.policies.wlr import WLR

GOALS_US = {"wlr_4_tokens_us": 60, "wlr_512_tokens_us": 400, "joint_512_tokens_us": 1500}


def random_round(tokens: int, k: int, experts: int, devices: int) -> tuple[Routing, State]:
    rng = np.random.default_rng(7)
    logit_TE = rng.normal(size=(tokens, experts)).astype(np.float32) * 2
    expert_TK = np.argsort(-logit_TE, axis=1)[:, :k]
    weight_TK = np.exp(np.take_along_axis(logit_TE, expert_TK, axis=1))
    weight_TK /= weight_TK.sum(axis=1, keepdims=True)
    holds_NE = np.arange(devices)[:, None] == np.arange(experts) % devices
    token_s_N = rng.uniform(1e-3, 20e-3, devices)
    nothing_N = np.zeros(devices)
    air = Air(100e6, 10 ** rng.uniform(7, 10, (2, devices)), np.tile(0.3 * token_s_N, (2, 1)))
    state = State(token_s_N, np.ones(devices, bool), nothing_N, nothing_N, nothing_N, token_s_N, air)
    return Routing(0, expert_TK, weight_TK, holds_NE), state


def median_us(call: Callable[[], object], seconds: float = 0.5) -> float:
    durations_ns = []
    end_ns = time.perf_counter_ns() + int(seconds * 1e9)
    while (begin_ns := time.perf_counter_ns()) < end_ns:
        call()
        durations_ns.append(time.perf_counter_ns() - begin_ns)
    return round(statistics.median(durations_ns) / 1000, 1)


def policy_costs() -> dict[str, float]:
    costs = {}
    policies: list[Policy] = [TopK(), WLR(0.2), LoadAware(0.02), Joint(0.02)]
    for policy in policies:
        for tokens in (4, 512):
            for k, experts, suffix in ((2, 8, ""), (4, 64, "_k4_e64")):
                routing, state = random_round(tokens, k, experts, devices=8)
                costs[f"{policy.name}_{tokens}_tokens{suffix}_us"] = median_us(lambda: policy.select(routing, state))  # noqa: B023
    return costs


def main() -> None:
    costs = policy_costs()
    for name, cost_us in costs.items():
        goal = f"goal {GOALS_US[name]}" if name in GOALS_US else ""
        print(f"{name.removesuffix('_us'):28}{cost_us:8.1f} us   {goal}")
    print(json.dumps(costs))


if __name__ == "__main__":
    main()
