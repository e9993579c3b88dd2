"""`python -m jetson_node` (also `testbed node`): one expert node, on a Jetson or on a laptop."""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import re
import secrets
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NoReturn

from jetson_node.experts import AUTO, Experts, make_experts
from jetson_node.link import Link
from jetson_node.pacing import Pacing
from jetson_node.rows import RowFiles, Rows
from jetson_node.service import told_to_systemd
from jetson_node.telemetry import Telemetry
from jetson_node.worker import Worker
from testbed.checkpoint.manifest import Manifest, load_manifest, manifest_hash
from testbed.collector import keep_what_is_loaded
from testbed.errors import ConfigError, WdmoeError
from testbed.latency.model import ComputeModel
from testbed.paths import state_directory
from testbed.shaping import UplinkShaper
from testbed.wire.keys import read_pair, read_public
from testbed.wire.messages import PROTOCOL_VERSION, Hello
from testbed.wire.sockets import NodeSocket

EXAMPLES = """examples:
  testbed node --name jetson-0 --station tcp://10.0.0.1:5555 --shards /var/lib/wdmoe/mixtral --keys /etc/wdmoe/keys
  testbed node --name laptop --station tcp://127.0.0.1:5555 --shards ./split --keys ./keys --backend numpy
"""


class OneLineParser(argparse.ArgumentParser):
    """Tells a mistake in one line, as every other mistake is told."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def endpoint(text: str) -> str:
    found = re.fullmatch(r"tcp://[^\s:/]+:(\d{1,5})", text)
    if found is None or not 0 < int(found[1]) < 2**16:
        raise argparse.ArgumentTypeError(f"{text} is not tcp://ADDRESS:PORT")
    return text


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def rate(text: str) -> float:
    number = seconds(text)
    if number == 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 up")
    return number


def parser() -> argparse.ArgumentParser:
    p = OneLineParser(
        prog="testbed node", description="Run the experts of one device for a base station.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument("--name", required=True, help="this device's name, as enrolled at the base station")
    p.add_argument(
        "--station", required=True, type=endpoint, help="where the base station listens, e.g. tcp://10.0.0.1:5555"
    )
    p.add_argument("--shards", required=True, type=Path, help="folder with manifest.json and this device's shard")
    p.add_argument("--keys", type=Path, help="folder with NAME.key, NAME.pub and bs.pub")
    p.add_argument("--insecure", action="store_true", help="no encryption and no keys: for measuring their cost only")
    p.add_argument("--backend", choices=("auto", "torch", "numpy"), default="auto", help="what computes the FFN")
    p.add_argument(
        "--dtype", choices=(AUTO, "float32", "float16", "bfloat16"), default=AUTO,
        help="what torch holds and computes in where the shard is not int8 or int4 (default: the shard's own on a GPU; "
        "float32 on a CPU, where it is the faster one); numpy holds float32",
    )  # fmt: skip
    p.add_argument("--threads", type=count, default=1, help="threads of the CPU backend (default 1)")
    p.add_argument("--part-bytes", type=count, default=65536, help="largest part of a reply (default 65536)")
    p.add_argument("--emulated-row-s", type=rate, help="pad compute to a device that takes so long for a row")
    p.add_argument("--emulated-expert-s", type=seconds, default=0.0, help="... and at least so long to read an expert")
    p.add_argument("--emulated-base-s", type=seconds, default=0.0, help="... after so long for the block itself")
    p.add_argument("--pace-file", type=Path, help="a number in a file that multiplies the emulated time, live")
    p.add_argument(
        "--shape-interface", metavar="NAME", help="shape what is sent to the station as it asks (tc, CAP_NET_ADMIN)"
    )
    p.add_argument(
        "--rows", type=Path, metavar="FOLDER",
        help="keep a row of every block here, 256 MiB at most (default ~/.local/state/wdmoe-testbed/node-rows/NAME)",
    )  # fmt: skip
    p.add_argument("--no-rows", action="store_true", help="keep none")
    p.add_argument("--join-timeout-s", type=seconds, default=30.0, help="give up when not taken in; 0 waits for ever")
    p.add_argument("--stop-with-parent", action="store_true", help="end when the process that started this one ends")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run a node until the base station says goodbye. Returns the exit code; a mistake is one line on stderr."""
    try:
        args = parser().parse_args(argv)
        stop = told_to_systemd(_stop_condition(args.stop_with_parent))
        with _uplink(args) as shaper:
            _serve(args, stop, shaper)
    except WdmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _serve(args: argparse.Namespace, stop: Callable[[], bool], shaper: UplinkShaper | None) -> None:
    manifest = load_manifest(args.shards)
    if args.name not in manifest.devices:
        raise ConfigError(f"--name {args.name}: not a device of {args.shards} (it has {', '.join(manifest.devices)})")
    make_socket, pacing = _socket_maker(args), _pacing(args)
    experts = make_experts(
        args.shards, manifest, args.name, backend=args.backend, dtype=args.dtype, threads=args.threads
    )
    experts.warm_up()
    keep_what_is_loaded()
    telemetry = Telemetry()
    hello = _hello(args, manifest, pacing, experts)
    rows = _rows(args, hello.boot_id)
    link = Link(make_socket, hello, args.join_timeout_s, shaper=shaper)
    worker = Worker(
        link,
        experts,
        figures=lambda: {**telemetry.figures(), **rows.figures()},
        stop=stop,
        pacing=pacing,
        rows=rows,
        part_bytes=args.part_bytes,
    )
    try:
        worker.run()
    finally:
        link.close()
        rows.close()
        telemetry.close()


def _hello(args: argparse.Namespace, manifest: Manifest, pacing: Pacing, experts: Experts) -> Hello:
    return Hello(
        protocol=PROTOCOL_VERSION,
        device=args.name,
        boot_id=secrets.randbits(62),
        manifest_sha256=manifest_hash(manifest),
        experts_held=manifest.held_counts(args.name),
        emulated=pacing.told(),
        computes=experts.backend,
    )


def _rows(args: argparse.Namespace, boot_id: int) -> Rows:
    """The node's own rows. Two options rather than one, so that what a script says can be taken back behind it."""
    if args.no_rows:
        return Rows()
    return RowFiles(args.rows or state_directory() / "node-rows" / args.name, args.name, boot_id)


def _socket_maker(args: argparse.Namespace) -> Callable[[], NodeSocket]:
    if args.insecure:
        return lambda: NodeSocket(args.station, None, None)
    if args.keys is None:
        raise ConfigError("--keys is missing: name the folder with this device's keys, or type --insecure")
    keys, station_public = read_pair(args.keys, args.name), read_public(args.keys / "bs.pub")
    return lambda: NodeSocket(args.station, keys, station_public)


def _uplink(args: argparse.Namespace) -> AbstractContextManager[UplinkShaper | None]:
    if args.shape_interface is None:
        return nullcontext()
    host = args.station.removeprefix("tcp://").rsplit(":", 1)[0]
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        raise ConfigError(f"--station {args.station}: no address for {host}: {error.strerror}: give one") from None
    return UplinkShaper(args.shape_interface, address)


def _pacing(args: argparse.Namespace) -> Pacing:
    if args.emulated_row_s is None:
        return Pacing(None)
    return Pacing(ComputeModel(args.emulated_base_s, args.emulated_expert_s, args.emulated_row_s), args.pace_file)


def _stop_condition(with_parent: bool) -> Callable[[], bool]:
    """True once SIGTERM came, or the parent is gone."""
    terminated: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: terminated.append(number))
    parent_gone = _parent_gone() if with_parent else lambda: False
    return lambda: bool(terminated) or parent_gone()


def _parent_gone() -> Callable[[], bool]:
    """Whether the process that started this one has ended. A fork server outlives it: it stays for its children."""
    starter = multiprocessing.parent_process()
    if starter is not None:
        return lambda: bool(select.select([starter.sentinel], [], [], 0)[0])
    parent = os.getppid()
    return lambda: os.getppid() != parent


if __name__ == "__main__":
    sys.exit(main())
