"""Nodes as processes of this machine, for a laptop: the same `main(argv)` that runs on a board.

A fork server that has torch loaded starts them: eight processes that each import torch would take two minutes of CPU
time together on a small machine. It has no ZeroMQ context, no threads and no CUDA when it forks.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import MappingProxyType

from testbed.channel.kernel import enter
from testbed.errors import NodeError

PRELOADED = ["jetson_node.__main__", "jetson_node.torch_experts", "testbed.wire.quantization"]
RESTART_AFTER_S = 1.0
RESTART_AT_MOST_S = 30.0
HEALTHY_AFTER_S = 10.0
WATCH_EVERY_S = 0.1


def prepare_fork_server() -> None:
    """Say what it loads. To be called before whatever starts the first process: it cannot be told later."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C takes effect after the block: a process half started could not be ended, nor would it be silent.

    What is started in the block never hears of Ctrl-C, which a terminal sends to all: the base station ends its nodes.
    """
    if threading.current_thread() is not threading.main_thread():  # Ctrl-C never arrives there
        yield
        return
    resource_tracker.ensure_running()  # it would start in the block otherwise, and let signals through again
    arrived: list[int] = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited; other threads still take signals
    handler = signal.signal(signal.SIGINT, lambda number, _frame: arrived.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if arrived:
        raise KeyboardInterrupt


def _node_process(argv: Sequence[str], output: str, namespace: str | None) -> None:
    """In the child: everything it prints goes to its own file."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if namespace is not None:
        enter(namespace)
    from jetson_node.__main__ import main  # noqa: PLC0415 - loaded in the fork server already

    sys.exit(main(argv))


class LocalNode:
    """One node process and its successors."""

    def __init__(self, name: str, argv: Sequence[str], output: Path, namespace: str | None) -> None:
        self.name, self.output, self._namespace = name, output, namespace
        self._argv = argv
        self.process: ForkServerProcess | None = None
        self.started_s = 0.0
        self.restart_at_s: float | None = None
        self._backoff_s = RESTART_AFTER_S

    def start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        arguments = (self._argv, str(self.output), self._namespace)
        process = context.Process(target=_node_process, args=arguments, name=self.name, daemon=True)
        process.start()
        self.process, self.started_s, self.restart_at_s = process, time.monotonic(), None

    def plan_restart(self, now_s: float) -> float:
        """When to start it again: after one second, then ever later while it keeps dying young."""
        if now_s - self.started_s > HEALTHY_AFTER_S:
            self._backoff_s = RESTART_AFTER_S
        wait_s, self._backoff_s = self._backoff_s, min(2 * self._backoff_s, RESTART_AT_MOST_S)
        self.restart_at_s = now_s + wait_s
        return wait_s

    def last_words(self) -> str:
        """The last line it printed, if it printed any."""
        lines = self.output.read_text(errors="replace").strip().splitlines() if self.output.exists() else []
        return lines[-1] if lines else "it printed nothing"


class LocalFleet:
    """Starts the nodes, starts a dead one again, stops them all. Use as a context manager.

    `argv_of` maps a device's name to its command line. `on_event(kind, **facts)` hears of deaths and restarts.
    `namespaces` maps a device's name to the network namespace that it runs in, where it has one of its own.
    """

    def __init__(
        self,
        argv_of: Mapping[str, Sequence[str]],
        outputs: Path,
        on_event: Callable[..., None],
        namespaces: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        outputs.mkdir(parents=True, exist_ok=True)
        self.nodes = [
            LocalNode(name, argv, outputs / f"{name}.log", namespaces.get(name)) for name, argv in argv_of.items()
        ]
        self._on_event = on_event
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="fleet-watcher", daemon=True)

    def __enter__(self) -> LocalFleet:
        prepare_fork_server()
        try:
            with _interrupts_wait():
                for node in self.nodes:
                    node.start()
            self._watcher.start()
        except BaseException:
            self.stop(0.0)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(0.5)

    def raise_if_dead(self) -> None:
        """Before all have joined, a node that ended has failed. Raises NodeError with its last words."""
        for node in self.nodes:
            if node.restart_at_s is not None:
                raise NodeError(f"{node.name} ended while starting: {node.last_words()} (all of it: {node.output})")

    def _watch(self) -> None:
        while not self._stopping.is_set():
            running = [node.process for node in self.nodes if node.process is not None and node.process.is_alive()]
            multiprocessing.connection.wait([process.sentinel for process in running], timeout=WATCH_EVERY_S)
            for node in self.nodes:
                if not self._stopping.is_set():
                    self._look_after(node, time.monotonic())

    def _look_after(self, node: LocalNode, now_s: float) -> None:
        if node.restart_at_s is not None:
            if now_s >= node.restart_at_s:
                node.start()
                self._on_event("process_restarted", device=node.name)
        elif node.process is not None and node.process.exitcode:  # 0: it was told that the run is over
            exit_code = node.process.exitcode
            wait_s = node.plan_restart(now_s)
            self._on_event("process_died", device=node.name, exit_code=exit_code, restart_in_s=wait_s)

    def stop(self, patience_s: float) -> None:
        """Let them end by themselves for a moment, then end them. Nothing is left running."""
        self._stopping.set()
        if self._watcher.is_alive():
            self._watcher.join()
        processes = [node.process for node in self.nodes if node.process is not None]
        deadline_s = time.monotonic() + patience_s
        for process in processes:
            process.join(max(0.0, deadline_s - time.monotonic()))
        for process in processes:
            if process.exitcode is None:
                process.terminate()
        for process in processes:
            process.join(2.0)
            if process.exitcode is None:
                process.kill()
                process.join()
