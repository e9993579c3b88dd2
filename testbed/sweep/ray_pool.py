"""Points of a sweep spread over a Ray cluster: one task of one core each. What they answer is written here, not there.

Ray carries a point and its answer in its own way (pickle), inside the cluster, which whoever starts it must trust.
"""

from __future__ import annotations

import importlib
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from testbed.errors import ConfigError
from testbed.sweep.grid import Point
from testbed.sweep.points import Outcome, PointRunner, attempt

REACHED_WITHIN_S, HEALTHY_WITHIN_S = 3.0, 10.0
START = "start one with `ray start --head`, or name its HOST:PORT"


class RayPool:
    """Runs points on the cluster that `ray_cluster` has joined."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray

    def __call__(self, points: Sequence[Point], run_point: PointRunner) -> Iterator[tuple[Point, Outcome]]:
        """Answer in the order in which points end. One that Ray lost three times has failed."""
        task = self._ray.remote(num_cpus=1)(attempt)
        waiting = {task.remote(run_point, point.config): point for point in points}
        while waiting:
            (answer,), _ = self._ray.wait(list(waiting), num_returns=1)
            yield waiting.pop(answer), self._outcome(answer)

    def _outcome(self, answer: Any) -> Outcome:
        try:
            outcome: Outcome = self._ray.get(answer)
        except self._ray.exceptions.RayError as error:  # the node died, or has another version of this program
            return Outcome(None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", 0.0)
        return outcome


@contextmanager
def ray_cluster(address: str) -> Iterator[RayPool]:
    """Join the cluster at HOST:PORT, or this machine's with "auto"; leave it at the end, its unfinished tasks ended.

    Raises ConfigError within seconds where there is no Ray or no cluster.
    """
    try:
        ray: Any = importlib.import_module("ray")  # an extra
    except ModuleNotFoundError:
        raise ConfigError("--ray: Ray is not installed: pip install 'wdmoe-testbed[ray]'") from None
    if address != "auto":
        _refuse_unless_it_answers(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ConfigError(f"--ray {address}: no Ray cluster ({reason}); {START}") from error
    try:
        yield RayPool(ray)
    finally:
        ray.shutdown()


def _refuse_unless_it_answers(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise ConfigError(f'--ray {address}: write HOST:PORT of the cluster\'s head, such as 10.0.0.1:6379, or "auto"')
    try:
        socket.create_connection((host, int(port)), REACHED_WITHIN_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--ray {address}: nothing answers there ({error}); {START}") from error
    check = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        healthy = subprocess.run(check, capture_output=True, check=False, timeout=HEALTHY_WITHIN_S).returncode == 0
    except subprocess.TimeoutExpired:
        healthy = False
    if not healthy:
        raise ConfigError(f"--ray {address}: what answers there is no healthy Ray cluster; {START}")
