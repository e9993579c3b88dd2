"""The kernel holds back what is sent to a device or a station, and only that; nothing of it outlives its owner."""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np
import psutil
import pytest
from processes import JETSON_NODE, until
from splits import write_split

from bs_node.registry import Registry
from bs_node.station import Station
from testbed.channel.kernel import enter, names, remove, remove_leftovers, run
from testbed.channel.kernel import missing as missing_for_namespaces
from testbed.checkpoint.ffn import FfnSpec
from testbed.errors import ConfigError
from testbed.shaping import DownlinkShaper, UplinkShaper
from testbed.wire.sockets import StationSocket

REASON = missing_for_namespaces()
in_kernel = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DEADLINE_S = 20.0
NO_RUNS_SUBNET = 999  # in the names of namespaces: no run has it
STATION, OTHER_STATION, NEAR, FAR, STRANGER = (f"198.18.0.{n}" for n in range(1, 6))
AIR = "air0"  # either end
AT = {"near": NEAR, "far": FAR}

T = TypeVar("T")


class Place:
    """A network namespace, and a thread that stays in it: what it starts and opens is there."""

    def __init__(self, stack: ExitStack, namespace: str) -> None:
        self._thread = stack.enter_context(ThreadPoolExecutor(1))
        self.do(lambda: enter(namespace))

    def do(self, act: Callable[[], T]) -> T:
        return self._thread.submit(act).result(DEADLINE_S)

    def tool(self, command: str) -> str:
        done = self.do(lambda: subprocess.run(command.split(), capture_output=True, text=True, check=True))
        return done.stdout

    def state(self) -> str:
        """All that shaping may change."""
        return self.tool(f"tc qdisc show dev {AIR}") + self.tool(f"ip -details link show dev {AIR}")


class Flow:
    """Bytes that one end sends without pause and the other counts as they come."""

    def __init__(self, stack: ExitStack, sender: Place, sends_from: str, receiver: Place, address: str) -> None:
        door = stack.enter_context(closing(receiver.do(lambda: socket.create_server((address, 0)))))
        to, by = door.getsockname(), (sends_from, 0)
        self.source = stack.enter_context(closing(sender.do(lambda: socket.create_connection(to, 10, by))))
        self.sink = stack.enter_context(closing(door.accept()[0]))
        self.sink.settimeout(DEADLINE_S)
        self.came: list[tuple[float, int]] = [(time.monotonic(), 0)]

    def carry(self, size_bytes: int) -> None:
        """From one end to the other, whole."""
        with ThreadPoolExecutor(1) as other_side:
            sent = other_side.submit(self.source.sendall, bytes(size_bytes))
            self._count(lambda: self.came[-1][1] < size_bytes)
            sent.result(DEADLINE_S)

    def keep_going(self, stack: ExitStack) -> None:
        """Until the stack ends."""

        def send() -> None:
            while True:
                self.source.sendall(bytes(16384))

        def until_cut(act: Callable[[], None]) -> None:
            with suppress(OSError):
                act()

        def stop() -> None:
            for end in (self.source, self.sink):
                until_cut(lambda end=end: end.shutdown(socket.SHUT_RDWR))
            for thread in threads:
                thread.join(DEADLINE_S)

        acts = send, lambda: self._count(lambda: True)
        threads = [threading.Thread(target=until_cut, args=(act,)) for act in acts]
        for thread in threads:
            thread.start()
        stack.callback(stop)

    def _count(self, wanted: Callable[[], bool]) -> None:
        while wanted() and (more := len(self.sink.recv(65536))):
            self.came.append((time.monotonic(), self.came[-1][1] + more))

    def bits_per_s(self, begin_s: float, end_s: float) -> float:
        until(lambda: self.came[-1][0] > end_s, DEADLINE_S, "bytes after the end of what is measured")
        times, counts = zip(*list(self.came), strict=True)
        return float(np.diff(np.interp([begin_s, end_s], times, counts))[0] * 8 / (end_s - begin_s))


def rates_from_now(*flows: Flow, after_s: float = 0.05, windows: int = 5) -> list[float]:
    """Median over windows of 0.1 s, as this program may be late to count; at the earliest `after_s` from now."""
    begin_s = time.monotonic() + after_s
    edges_s = [begin_s + 0.1 * n for n in range(windows + 1)]
    return [statistics.median(flow.bits_per_s(*edges) for edges in pairwise(edges_s)) for flow in flows]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def places(stack: ExitStack) -> tuple[Place, Place]:
    """A station's place and a device's, joined by one cable; two addresses at the first, three at the second."""
    remove_leftovers()
    ends = [names(os.getpid(), NO_RUNS_SUBNET, n) for n in range(2)]
    stack.callback(remove, ends)
    (here, _), (there, _) = ends
    cable = f"link add {AIR} netns {here} type veth peer name {AIR} netns {there}"
    run({("ip", None): [f"netns add {here}", f"netns add {there}", cable]})
    for namespace, addresses in ((here, [STATION, OTHER_STATION]), (there, [NEAR, FAR, STRANGER])):
        given = [f"address add {address}/24 dev {AIR}" for address in addresses]
        run({("ip", namespace): ["link set lo up", *given, f"link set {AIR} up"]})
    return Place(stack, here), Place(stack, there)


def shape_down(stack: ExitStack, place: Place, total_bits_per_s: float = 100e6) -> DownlinkShaper:
    shaper = place.do(lambda: DownlinkShaper(AIR, AT, total_bits_per_s))
    stack.callback(lambda: place.do(shaper.close))
    return shaper


def shape_up(stack: ExitStack, place: Place) -> UplinkShaper:
    shaper = place.do(lambda: UplinkShaper(AIR, STATION))
    stack.callback(lambda: place.do(shaper.close))
    return shaper


Bed = tuple[Callable[[float], None], Flow]


@pytest.fixture(params=["down", "up"])
def bed(request: pytest.FixtureRequest, stack: ExitStack, places: tuple[Place, Place]) -> Bed:
    """What sets the rate of a direction, and a flow in that direction."""
    station, device = places
    if request.param == "down":
        down = shape_down(stack, station)
        return (lambda rate: down.set_rates([rate, 1e6])), Flow(stack, station, STATION, device, NEAR)
    return shape_up(stack, device).set_rate, Flow(stack, device, NEAR, station, STATION)


@in_kernel
@pytest.mark.parametrize("asked", [2e6, 60e6])
def test_a_flow_has_the_rate_that_was_asked_within_a_tenth(stack: ExitStack, bed: Bed, asked: float) -> None:
    set_rate, flow = bed
    set_rate(asked)
    flow.keep_going(stack)
    tries = [rates_from_now(flow, after_s=0.1)[0] for _ in range(5)]  # the machine may be busy in some of them
    assert median(tries) == pytest.approx(asked, rel=0.1)


@in_kernel
def test_a_new_rate_holds_50_ms_later_for_what_is_under_way(stack: ExitStack, bed: Bed) -> None:
    set_rate, flow = bed
    set_rate(4e6)
    flow.keep_going(stack)
    rates_from_now(flow, windows=1)
    ratios = []
    for asked in (30e6, 3e6, 15e6, 5e6, 20e6):
        set_rate(asked)
        ratios += [rate / asked for rate in rates_from_now(flow, windows=1)]
    assert sorted(ratios)[1:-1] == pytest.approx([1, 1, 1], abs=0.1), ratios  # twice the machine may be late


@in_kernel
def test_a_small_block_feels_the_rate_though_the_system_would_send_it_as_one_frame(bed: Bed) -> None:
    set_rate, flow = bed
    set_rate(2e6)
    began_s = time.monotonic()
    flow.carry(16_384)
    assert time.monotonic() - began_s > (16_384 - 5000) * 8 / 2e6  # no upper bound: a busy machine may be late


@in_kernel
@pytest.mark.parametrize("up", [False, True])
def test_another_hosts_traffic_is_not_touched(stack: ExitStack, places: tuple[Place, Place], up: bool) -> None:
    station, device = places
    shape_down(stack, station).set_rates([1e6, 1e6])
    shape_up(stack, device).set_rate(1e6)
    ways = (device, NEAR, station, STATION), (device, NEAR, station, OTHER_STATION)
    if not up:
        ways = (station, STATION, device, NEAR), (station, STATION, device, STRANGER)
    slow, free = (Flow(stack, *way) for way in ways)
    with ThreadPoolExecutor(1) as other_side:
        shaped = other_side.submit(slow.carry, 125_000)
        free.carry(10_000_000)  # 80 s at the other's rate
        assert not shaped.done()  # 1 s
        shaped.result(DEADLINE_S)


@in_kernel
def test_each_device_has_a_rate_of_its_own_and_none_borrows(stack: ExitStack, places: tuple[Place, Place]) -> None:
    station, device = places
    shaper = shape_down(stack, station, 20e6)
    flows = [Flow(stack, station, STATION, device, address) for address in AT.values()]
    for flow in flows:
        flow.keep_going(stack)
    for asked in ((16e6, 4e6), (4e6, 16e6)):
        shaper.set_rates(asked)
        assert rates_from_now(*flows, windows=3) == pytest.approx(asked, rel=0.1)
    shaper.set_rates([20e6, 0.0])  # who has no rows keeps its rate
    assert rates_from_now(*flows, windows=3) == pytest.approx([20e6, 16e6], rel=0.1)


@in_kernel
def test_nothing_is_left_on_exit(places: tuple[Place, Place]) -> None:
    station, device = places
    before = station.state(), device.state()

    def shape(make: Callable[[], DownlinkShaper | UplinkShaper]) -> None:
        with make() as shaper:
            shaped = subprocess.run(["tc", "class", "show", "dev", AIR], capture_output=True, text=True, check=True)
            assert shaped.stdout.count("class htb d0e:") == (2 if isinstance(shaper, DownlinkShaper) else 1)
        shaper.close()  # again is no mistake

    station.do(lambda: shape(lambda: DownlinkShaper(AIR, AT, 20e6)))
    device.do(lambda: shape(lambda: UplinkShaper(AIR, STATION)))
    assert (station.state(), device.state()) == before


OWNER = """
import sys
from testbed.shaping import DownlinkShaper
shaper = DownlinkShaper("air0", {"near": "198.18.0.3"}, 1e6)
print("shaped", flush=True)
sys.stdin.read()
"""


@in_kernel
def test_what_a_killed_owner_left_is_removed_by_the_next(places: tuple[Place, Place]) -> None:
    station, _ = places
    station.tool(f"ip link set dev {AIR} gso_max_segs 40")
    before = station.state()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    owner = station.do(lambda: subprocess.Popen([sys.executable, "-c", OWNER], text=True, **pipes))
    with owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "shaped\n"
        with pytest.raises(ConfigError, match="air0 is already shaped by a running program: stop that first"):
            station.do(lambda: DownlinkShaper(AIR, AT, 20e6))
        tools = psutil.Process(owner.pid).children()
        owner.kill()
    assert not psutil.wait_procs(tools, DEADLINE_S)[1]  # its tc ended with it
    assert station.state() != before
    with closing(station.do(lambda: DownlinkShaper(AIR, AT, 20e6))) as shaper:
        shaper.set_rates([5e6, 6e6])
        assert "rate 6Mbit" in station.tool(f"tc class show dev {AIR}")
        station.do(shaper.close)
    assert station.state() == before


@in_kernel
def test_the_end_of_tc_is_told_and_the_interface_still_restored(stack: ExitStack, places: tuple[Place, Place]) -> None:
    station, _ = places
    before = station.state()
    shaper = shape_down(stack, station)
    (tool,) = [child for child in psutil.Process().children() if child.name() == "tc"]
    tool.kill()
    with pytest.raises(ConfigError, match=r"^rate shaping: tc ended with exit code -9: .*start again$"):
        shaper.set_rates([1e6, 1e6])
    station.do(shaper.close)
    assert station.state() == before


@in_kernel
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("qdisc delete dev air0 root", "tc ended with exit code 1: .*Command failed"),
        (
            "class replace dev air0 parent d0e: classid d0e:3 htb rate 1mbit",
            "air0 has classes of .*, .*, .* instead of",
        ),
    ],
)
def test_another_program_that_changes_the_classes_is_noticed(
    stack: ExitStack, places: tuple[Place, Place], command: str, words: str
) -> None:
    station, _ = places
    shaper = shape_down(stack, station)
    station.tool(f"tc {command}")
    with pytest.raises(ConfigError, match=words) as told:
        shaper.set_rates([1e6, 1e6])
    assert "\n" not in str(told.value)


@in_kernel
def test_an_interface_that_is_unplugged_is_told_and_needs_no_restoring(
    stack: ExitStack, places: tuple[Place, Place]
) -> None:
    station, _ = places
    shaper = shape_down(stack, station)
    station.tool(f"ip link delete {AIR}")
    with pytest.raises(ConfigError, match=r"No such device|Cannot find device"):
        shaper.set_rates([1e6, 1e6])


@in_kernel
@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ([1e6], "1 rates for 2 devices: give one for each"),
        ([1e6, 999.0], "the rate of far is 999 bit/s: it must be from 1000"),
        ([-1.0, 1e6], "the rate of near is -1 bit/s"),
        ([1e6, np.nan], "the rate of far is nan bit/s"),
        ([60e6, 60e6], r"1.2e\+08 bit/s asked in all, above the total of 1e\+08: give shares of it"),
    ],
)
def test_rates_that_cannot_be_are_told_and_the_old_ones_stay(
    stack: ExitStack, places: tuple[Place, Place], rates: list[float], words: str
) -> None:
    station, _ = places
    shaper = shape_down(stack, station)
    shaper.set_rates([1e6, 2e6])
    before = station.tool(f"tc class show dev {AIR}")
    with pytest.raises(ConfigError, match=words):
        shaper.set_rates(rates)
    assert station.tool(f"tc class show dev {AIR}") == before


@in_kernel
def test_a_qdisc_of_somebody_else_stays(places: tuple[Place, Place]) -> None:
    station, _ = places
    station.tool(f"tc qdisc add dev {AIR} root handle 7: pfifo limit 99")
    before = station.state()
    with pytest.raises(ConfigError, match=r"root qdisc of its own \(pfifo 7:\).*remove it with `tc qdisc delete"):
        station.do(lambda: DownlinkShaper(AIR, AT, 20e6))
    assert station.state() == before


@in_kernel
def test_an_address_behind_another_interface_is_told_and_nothing_is_left(places: tuple[Place, Place]) -> None:
    station, _ = places
    before = station.state()
    with pytest.raises(ConfigError, match=rf"far \({STATION}\) is reached by lo, not by {AIR}: name that one"):
        station.do(lambda: DownlinkShaper(AIR, {**AT, "far": STATION}, 20e6))
    with pytest.raises(ConfigError, match=r"ip -json route get 10.1.1.1: .*unreachable: mend that"):
        station.do(lambda: DownlinkShaper(AIR, {"near": "10.1.1.1"}, 20e6))
    assert station.state() == before


@in_kernel
def test_root_without_the_capability_is_told_so(places: tuple[Place, Place]) -> None:
    _, device = places
    drop = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"]
    node = [*JETSON_NODE, *f"--name near --station tcp://{STATION}:5 --shards . --shape-interface {AIR}".split()]
    done = device.do(lambda: subprocess.run([*drop, *node], capture_output=True, text=True, check=False))
    if done.returncode == 127 or "setpriv" in done.stderr:
        pytest.skip(f"setpriv cannot drop a capability here: {done.stderr}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: rate shaping needs root or CAP_NET_ADMIN: start as root, or without rate shaping\n"


SPEC = FfnSpec(width=8, inner=8, has_gate=True, act="silu")


@in_kernel
def test_a_node_shapes_what_its_station_asks_and_leaves_nothing_at_goodbye(
    stack: ExitStack, places: tuple[Place, Place], tmp_path: Path
) -> None:
    here, there = places
    before, manifest = there.state(), write_split(tmp_path / "split", SPEC, devices=["near"])[0]
    told: list[str] = []
    sockets = here.do(lambda: StationSocket(STATION, 0, None, None))
    stack.callback(lambda: here.do(sockets.close))
    every = {"run": 1, "enrolled": None, "heartbeat_ns": 10**8, "window_bytes": 2**20}
    station = Station(
        sockets, Registry(manifest, silence_ns=10**10), on_event=lambda kind, **_: told.append(kind), **every
    )
    where = f"--station tcp://{STATION}:{sockets.port} --shards {tmp_path / 'split'} --shape-interface {AIR}"
    argv = [*JETSON_NODE, *f"--name near {where} --insecure --backend numpy --stop-with-parent".split()]
    node = there.do(lambda: subprocess.Popen(argv))
    stack.callback(node.wait, DEADLINE_S)
    stack.callback(node.kill)
    here.do(lambda: station.wait_for_all(DEADLINE_S, lambda: None))
    assert "rate 100Gbit" in there.tool(f"tc class show dev {AIR}")

    for rate in (5e6, 7.5e6):
        assert here.do(lambda rate=rate: station.shape(station.registry.nodes[0], rate))
        shown = f"rate {rate / 1e3:.0f}Kbit" if rate % 1e6 else f"rate {rate / 1e6:.0f}Mbit"
        until(lambda shown=shown: shown in there.tool(f"tc class show dev {AIR}"), DEADLINE_S, shown)
    here.do(station.say_goodbye)
    assert node.wait(DEADLINE_S) == 0
    assert there.state() == before
    assert "broken_message" not in told
