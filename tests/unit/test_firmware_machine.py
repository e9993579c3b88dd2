from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from firmware_boards import write

from firmware_setup.host import parse_memory, read_memory, read_thermal
from firmware_setup.machine import MOST_BYTES, Commands, Machine, NoCommands, clean

LONG_S = 100.0


def script(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def test_a_file_is_read_up_to_a_bound(tmp_path: Path) -> None:
    write(tmp_path, {"etc/long": b"x" * (MOST_BYTES + 1)})
    assert Machine(tmp_path).read("/etc/long") == b"x" * MOST_BYTES
    assert len(Machine().read("/dev/zero") or b"") == MOST_BYTES


@pytest.mark.parametrize("path", ["/absent", "/", "/pipe", "/loop"])
def test_what_cannot_be_read_is_empty_and_does_not_hang(tmp_path: Path, path: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("/loop")
    assert Machine(tmp_path).text(path) == ""


def test_links_stay_below_the_root(tmp_path: Path) -> None:
    root = write(tmp_path / "root", {"etc/real": "inside"})
    write(tmp_path, {"outside": "outside"})
    (root / "absolute").symlink_to("/etc/real")
    (root / "folder").symlink_to("/etc")
    (root / "upwards").symlink_to("../../outside")
    machine = Machine(root)
    assert machine.text("/absolute") == machine.text("/folder/real") == "inside"
    assert machine.text("/upwards") == machine.text("/../outside") == ""


def test_names_of_a_folder_are_in_order_and_absent_folders_empty(tmp_path: Path) -> None:
    machine = Machine(write(tmp_path, {"a/2": "", "a/1": ""}))
    assert machine.names("/a") == ["1", "2"]
    assert machine.names("/b") == []


@pytest.mark.parametrize(
    ("content", "number"), [("46\n", 46), ("-256\n", -256), ("", None), ("1e3", None), ("9" * 30, None), ("--1", None)]
)
def test_a_number_is_whole_or_none(tmp_path: Path, content: str, number: int | None) -> None:
    assert Machine(write(tmp_path, {"n": content})).number("/n") == number


def test_control_characters_never_reach_a_terminal() -> None:
    assert clean(b"a\x1b[31mb\0c\n\td\xff") == "a?[31mb?c\n\td?"


def test_a_command_says_its_code_and_both_of_its_outputs(tmp_path: Path) -> None:
    script(tmp_path, "speak", "echo out; echo err >&2; exit 3")
    answer = Commands(tmp_path).run("speak")
    assert (answer.code, sorted(answer.text.split()), answer.good) == (3, ["err", "out"], False)


def test_a_command_has_no_input_and_the_c_locale(tmp_path: Path) -> None:
    script(tmp_path, "ask", 'read line; echo "[$line] $LC_ALL"')
    assert Commands(tmp_path).run("ask").text == "[] C\n"


def test_a_command_that_is_not_there_is_an_answer(tmp_path: Path) -> None:
    assert Commands(tmp_path).run("ls").text == "ls is not installed"
    assert NoCommands().run("ls").code is None
    (tmp_path / "broken").write_text("#!/no/such/interpreter\n")
    (tmp_path / "broken").chmod(0o755)
    assert "does not start" in Commands(tmp_path).run("broken").text


def test_a_command_that_hangs_is_ended(tmp_path: Path) -> None:
    script(tmp_path, "hang", "sleep 1000")
    assert Commands(tmp_path, timeout_s=0.5).run("hang") == (None, "hang did not answer within 0.5 s")


def test_a_command_that_closes_its_output_and_goes_on_is_ended(tmp_path: Path) -> None:
    script(tmp_path, "hide", "exec >/dev/null 2>&1; sleep 1000")
    assert Commands(tmp_path, timeout_s=0.5).run("hide").code is None


def test_a_command_that_says_too_much_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    script(tmp_path, "flood", f'sleep 1000 & echo $! > "{tmp_path}/child"; exec yes')
    assert Commands(tmp_path, timeout_s=LONG_S).run("flood").text == f"flood said more than {MOST_BYTES // 1024} KiB"
    assert ends(int((tmp_path / "child").read_text()))


def test_a_command_is_found_where_a_users_path_does_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert Commands().run("true").good


def test_an_interrupt_ends_the_command_too(tmp_path: Path) -> None:
    # more than a pipe holds: when it was written, somebody reads
    script(
        tmp_path, "hang", f'echo $$ > "{tmp_path}/pid"; head -c 100000 /dev/zero; kill -INT {os.getpid()}; sleep 1000'
    )
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Commands(tmp_path, timeout_s=LONG_S).run("hang")
    finally:
        signal.signal(signal.SIGINT, previous)
    assert ends(int((tmp_path / "pid").read_text()))


def ends(pid: int) -> bool:
    deadline_s = time.monotonic() + LONG_S
    while time.monotonic() < deadline_s:
        stat = Machine().text(f"/proc/{pid}/stat")
        if not stat or stat.rpartition(")")[2].split()[0] in "ZX":  # gone, or dead and not yet reaped
            return True
        time.sleep(0.01)
    return False


def test_memory_is_in_bytes_and_unknown_where_the_kernel_does_not_say() -> None:
    memory = parse_memory("MemTotal:        7802880 kB\nMemAvailable:    6000000 kB\nMemAvailable: many kB\n")
    assert (memory.total_bytes, memory.available_bytes) == (7_802_880 * 1024, 6_000_000 * 1024)
    assert memory.swap_total_bytes is None


def test_this_machine_has_memory() -> None:
    total_bytes = read_memory(Machine()).total_bytes
    assert total_bytes is not None
    assert total_bytes > sys.getsizeof("")


def thermal(root: Path, zones: dict[str, str], cooling: dict[str, str]) -> Path:
    files = {}
    for kind, figure, values in (("thermal_zone", "temp", zones), ("cooling_device", "cur_state", cooling)):
        for place, (name, value) in enumerate(values.items()):
            folder = f"sys/class/thermal/{kind}{place}"
            files.update({f"{folder}/type": f"{name}\n", f"{folder}/{figure}": f"{value}\n"})
    return write(root, files)


def test_the_hottest_zone_counts_and_zones_without_power_do_not(tmp_path: Path) -> None:
    zones = {
        "cpu-thermal": "49468",
        "gpu-thermal": "50125",
        "cv0-thermal": "-256000",
        "soc0-thermal": "",
        "PMIC": "2147483647",
    }
    told = read_thermal(Machine(thermal(tmp_path, zones, {})))
    assert told.zones_c == {"cpu": 49.468, "gpu": 50.125}
    assert (told.hottest_c, told.throttled) == (50.125, None)


@pytest.mark.parametrize(
    ("cooling", "throttled"), [({"cpufreq-cpu0": "0", "pwm-fan": "3"}, False), ({"cpufreq-cpu0": "2"}, True)]
)
def test_a_fan_at_work_is_not_throttling(tmp_path: Path, cooling: dict[str, str], throttled: bool) -> None:
    assert read_thermal(Machine(thermal(tmp_path, {}, cooling))).throttled is throttled
