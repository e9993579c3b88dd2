"""What a simulation of 10 000 draws x 32 blocks x 8 devices takes: `python benchmarks/simulate.py`.

The paper's setting with eight prompts of the demo model (four layers each). Goal: under 10 s on two cores for the
unmodified model, for WLR, and for both with the band shared out anew in every block; drawing the channel and the
intervals included, routing and starting Python not. The last line of stdout is one JSON document, in seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from testbed.config import load_run_file
from testbed.experiment.model_split import split_model
from testbed.policies.topk import TopK
from testbed.policies.wlr import WLR
from testbed.simulation.allocation import Allocation
from testbed.simulation.draws import draw_channel
from testbed.simulation.montecarlo import simulate_policy
from testbed.simulation.quality import ModelInProcess
from testbed.simulation.results import paired_cut
from testbed.simulation.routing import pack

RUN_FILE = Path(__file__).parents[1] / "configs" / "paper.toml"
GOAL_S, PROMPTS = 10.0, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=10_000, help="of the channel (default 10000)")
    draws = parser.parse_args().draws
    config = load_run_file(RUN_FILE, [f"workload.score_prompts={PROMPTS}"])
    split_dir, manifest = split_model(config)
    blocks = ModelInProcess(config, split_dir, manifest).routing(draw_channel(config, manifest, PROMPTS, PROMPTS))
    packed = pack(blocks)

    seconds, begin_s = {}, time.perf_counter()
    channel = draw_channel(config, manifest, draws, PROMPTS)
    seconds["channel"] = time.perf_counter() - begin_s
    topk_s_D = None
    for policy, bandwidth in ((TopK(), "even"), (WLR(0.2), "even"), (TopK(), "optimal"), (WLR(0.2), "optimal")):
        begin_s = time.perf_counter()
        block_s_D = simulate_policy(policy, Allocation(bandwidth), blocks, packed, channel).block_s_DB.sum(axis=1)
        topk_s_D = block_s_D if topk_s_D is None else topk_s_D
        cut = paired_cut(block_s_D, topk_s_D, 1)
        name = f"{policy.name}, {bandwidth} bandwidth"
        seconds[name] = time.perf_counter() - begin_s
        print(f"{name:26} {seconds[name]:6.2f} s   simulated cut {cut.cut:6.1%} ({cut.low:.1%} to {cut.high:.1%})")
    total_s = sum(seconds.values())
    print(f"{draws} draws x {len(blocks)} blocks x {channel.devices} devices: channel {seconds['channel']:.2f} s, "
          f"all together {total_s:.2f} s (goal {GOAL_S:.0f} s)")  # fmt: skip
    print(json.dumps({**seconds, "total": total_s}))


if __name__ == "__main__":
    main()
