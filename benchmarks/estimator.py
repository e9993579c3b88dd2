"""What the latency estimate costs per round: `python benchmarks/estimator.py`.

Eight devices. Prints a table of medians; the last line of stdout is one JSON document, in microseconds.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from testbed.latency.estimator import Estimator, Lesson

GOALS_US = {"teach_us": 10, "teach_link_sum_us": 10, "state_us": 15}
DEVICES, ROW_BYTES, CALLS = 8, 4100, 100


def median_us(call: Callable[[int], object], seconds: float = 0.5) -> float:
    """Of one call, over batches of CALLS calls."""
    durations_ns = []
    end_ns = time.perf_counter_ns() + int(seconds * 1e9)
    while (begin_ns := time.perf_counter_ns()) < end_ns:
        for number in range(CALLS):
            call(number)
        durations_ns.append((time.perf_counter_ns() - begin_ns) / CALLS)
    return round(statistics.median(durations_ns) / 1000, 1)


def random_lessons(one_way_known: bool) -> list[Lesson]:
    """Lessons of one device: 5 to 60 rows, 5 % noise."""
    rng = np.random.default_rng(7)
    lessons = []
    for rows in rng.integers(5, 61, CALLS).tolist():
        size = rows * ROW_BYTES + 100
        compute_s, down_s, up_s = (rng.lognormal(0, 0.05, 3) * (2e-4 + 1e-4 * rows)).tolist()
        ways = {"down_s": down_s, "up_s": up_s} if one_way_known else {"link_s": down_s + up_s}
        lessons.append(Lesson(rows, 1, size, size, compute_s, **ways))
    return lessons


def costs() -> dict[str, float]:
    estimator = Estimator(DEVICES, ROW_BYTES, ROW_BYTES)
    available_N = np.ones(DEVICES, bool)
    known, summed = random_lessons(one_way_known=True), random_lessons(one_way_known=False)
    size = 30 * ROW_BYTES + 100
    return {
        "teach_us": median_us(lambda number: estimator.teach(number % DEVICES, known[number], 1.0)),
        "teach_link_sum_us": median_us(lambda number: estimator.teach(number % DEVICES, summed[number], 1.0)),
        "state_us": median_us(lambda _: estimator.state(0, available_N, 1.0)),
        "predict_us": median_us(lambda number: estimator.predict(number % DEVICES, 30, 1, size, size)),
    }


def main() -> None:
    measured = costs()
    for name, cost_us in measured.items():
        goal = f"goal {GOALS_US[name]}" if name in GOALS_US else ""
        print(f"{name.removesuffix('_us'):20}{cost_us:8.1f} us   {goal}")
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
