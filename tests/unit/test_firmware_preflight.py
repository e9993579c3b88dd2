from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from firmware_boards import PROBED, Spoken, orin_nano, orin_nano_says, write

import firmware_setup
from firmware_setup import summary
from firmware_setup.facts import Facts
from firmware_setup.flash.__main__ import _parser as flash_parser
from firmware_setup.machine import Answer, Machine
from firmware_setup.preflight import FINE, INTERRUPTED, PROBLEMS, WARNINGS, document, examine, main
from firmware_setup.preflight import _parser as preflight_parser
from firmware_setup.verdicts import Finding

PYTHON = "/opt/wdmoe/bin/python"
SOURCES = sorted(Path(firmware_setup.__file__).parent.rglob("*.py"))


def checked(root: Path, **changed: str | Answer) -> tuple[Facts, list[Finding]]:
    said = orin_nano_says(f"{PYTHON}", **changed)
    return examine(Machine(root, Spoken(said)), bs="192.0.2.9", python=PYTHON)


@pytest.fixture
def board(tmp_path: Path) -> Path:
    return orin_nano(tmp_path)


def test_a_healthy_board_has_nothing_to_say(board: Path) -> None:
    facts, findings = checked(board)
    assert findings == []
    assert facts.software is not None
    assert (facts.software.l4t, facts.software.jetpack, facts.software.python) == ("36.4.3", "6.2", "3.10.12")


def probed(**changed: object) -> str:
    return json.dumps({**PROBED, **changed})


UNLOCKED = "cpu0: MinFreq=1 MaxFreq=2 CurrentFreq=1\nGPU MinFreq=918000000 MaxFreq=918000000 CurrentFreq=1\n"
CAPPED = "cpu0: MinFreq=1 MaxFreq=1 CurrentFreq=1\nGPU MinFreq=624750000 MaxFreq=624750000 CurrentFreq=1\n"
NO_ROOT = Answer(1, "Error: Run this script(/usr/bin/jetson_clocks) as a root user\n")
UNREACHABLE = Answer(2, "RTNETLINK answers: Network is unreachable\n")
CPU_BUILD = probed(torch="2.14.0+cpu", built_for_cuda=None, available=False, products_right=None)
NO_KERNEL = probed(products_right=None, error="RuntimeError: no kernel image")
LATE_CLOCK = "C0000209,192.0.2.9,3,1,-0.4,0,0,0,0,0,0.002,0.0003,64,Normal"
CASES: list[tuple[str, str, str | Answer, str, str]] = [
    ("warning", "iw_save", "Power save: on\n", "wifi", "sudo iw dev wlP1p1s0 set power_save off"),
    ("warning", "iw_link", "Not connected.\n", "wifi", "not connected"),
    ("warning", "iw_link", "Connected to x\n\tsignal: -81 dBm\n", "wifi", "weak signal, -81 dBm"),
    ("warning", "clocks", UNLOCKED, "clocks", "sudo jetson_clocks"),
    ("warning", "clocks", NO_ROOT, "clocks", "needs root"),
    ("warning", "clocks", CAPPED, "power", "624.75 MHz only"),
    ("warning", "nvpmodel", Answer(None, "nvpmodel is not installed"), "power", "does not tell the power mode"),
    ("warning", "nvpmodel", "NV Power Mode: 99W\n9\n", "power", "not in /etc/nvpmodel.conf"),
    ("warning", "core", "nvidia-l4t-core\t36.4.7-20250918154033\n", "software", "NVIDIA bug 5602402"),
    ("warning", "core", "nvidia-l4t-core\t38.4.0-20251231000000\n", "software", "for Thor only"),
    ("warning", "core", "nvidia-l4t-core\t36.9.9-20271231000000\n", "software", "JetPack of L4T 36.9.9 is not known"),
    ("problem", "core", "nvidia-l4t-core\t35.4.1-20230801124926\n", "software", "Python 3.8 (JetPack 5.1.2)"),
    ("problem", "core", "nvidia-l4t-core\t32.7.1-20220219090432\n", "software", "Python 3.6 (JetPack 4.6.1)"),
    ("problem", "probe", probed(python="3.9.5"), "software", "not supported: Python 3.9.5"),
    ("warning", "probe", '{"python": "3.10.12", "torch": null}', "cuda", "torch is not installed"),
    ("warning", "probe", CPU_BUILD, "cuda", "built without CUDA, finds no GPU"),
    ("warning", "probe", probed(built_for_cuda="13.0"), "cuda", "built for CUDA 13.0, L4T 36.4.3 has CUDA 12.x"),
    ("problem", "probe", probed(products_right=False), "cuda", "wrong products on Orin"),
    ("problem", "probe", NO_KERNEL, "cuda", "no kernel image"),
    ("problem", "probe", Answer(None, "python did not answer within 120 s"), "cuda", "within 120 s"),
    ("problem", "probe", probed(numpy_bridge=False), "cuda", "do not work together"),
    ("problem", "route", UNREACHABLE, "route", "unreachable"),
    ("warning", "route", "192.0.2.9 dev enP8p1s0 src 192.0.2.21 uid 0", "route", "will not be over the air"),
    ("warning", "route", "192.0.2.9 dev l4tbr0 src 192.0.2.21 uid 0", "route", "USB or Docker"),
    ("warning", "chrony", Answer(None, "chronyc is not installed"), "time", "chronyc is not installed"),
    ("warning", "chrony", "00000000,,0,0,0,0,0,0,0,0,1,1,0,Not synchronised", "time", "not synchronised"),
    ("warning", "chrony", LATE_CLOCK, "time", "400 ms off"),
]


@pytest.mark.parametrize(("level", "command", "answer", "check", "words"), CASES)
def test_one_fault_is_found_and_named(
    board: Path, level: str, command: str, answer: str | Answer, check: str, words: str
) -> None:
    _, findings = checked(board, **{command: answer})
    assert [finding.level for finding in findings if finding.check == check and words in finding.text] == [level]


FILES: list[tuple[dict[str, str], str, str]] = [
    ({"sys/class/thermal/cooling_device0/cur_state": "2"}, "thermal", "slowed down"),
    ({"sys/class/thermal/thermal_zone0/temp": "91000"}, "thermal", "91 C"),
    ({"proc/meminfo": "MemTotal: 7802880 kB\nMemAvailable: 524288 kB\n"}, "memory", "512 MiB"),
    ({"proc/device-tree/compatible": "nvidia,p3767-0005\0nvidia,tegra234\0"}, "board", "without super mode"),
    (
        {"proc/device-tree/compatible": "nvidia,p9999-0001\0nvidia,tegra999\0"},
        "board",
        "p9999-0001 on tegra999 is not known",
    ),
    ({"proc/device-tree/compatible": "raspberrypi,5-model-b\0"}, "board", "no Jetson"),
]


@pytest.mark.parametrize(("files", "check", "words"), FILES)
def test_one_fault_in_a_file_is_found_and_named(board: Path, files: dict[str, str], check: str, words: str) -> None:
    write(board, files)
    _, findings = checked(board)
    assert [(finding.check, finding.level) for finding in findings if words in finding.text] == [(check, "warning")]


def test_a_check_that_breaks_is_a_warning_and_the_others_are_made(board: Path) -> None:
    class Breaking(Spoken):
        def run(self, name: str, *arguments: str, timeout_s: float | None = None) -> Answer:
            if name == "iw":
                raise RuntimeError("a driver\nof its own kind")
            return super().run(name, *arguments, timeout_s=timeout_s)

    machine = Machine(board, Breaking(orin_nano_says(PYTHON)))
    facts, findings = examine(machine, bs="192.0.2.9", python=PYTHON)
    assert findings == [Finding("warning", "wifi", "cannot be read (RuntimeError: a driver of its own kind)")]
    assert facts.wifi is None
    assert facts.time is not None


def test_what_is_not_known_is_null_or_unknown_and_never_0(tmp_path: Path) -> None:
    told = document(*examine(Machine(tmp_path, Spoken({})), python=None))
    assert told["jetson"] is False

    def leaves(value: Any) -> list[Any]:
        if isinstance(value, dict):
            return [leaf for item in value.values() for leaf in leaves(item)]
        return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else [value]

    facts = {name: value for name, value in told.items() if name not in ("preflight", "warnings", "problems")}
    assert 0 not in [leaf for leaf in leaves(facts) if not isinstance(leaf, bool)]


def spoken_folder(folder: Path, said: dict[str, str | Answer]) -> Path:
    """Stand-ins for the board's commands, as real programs."""
    folder.mkdir()
    for name in {line.split()[0] for line in said if "/" not in line}:
        cases = "".join(
            f"'{line}') cat <<'END'\n{text}\nEND\n;;\n" for line, text in said.items() if line.split()[0] == name
        )
        (folder / name).write_text(f'#!/bin/sh\ncase "{name}${{*:+ $*}}" in\n{cases}*) exit 1;;\nesac\n')
        (folder / name).chmod(0o755)
    return folder


def run(*arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    command = [python, "-m", "firmware_setup.preflight", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)


def test_a_whole_board_is_one_json_document_and_exit_code_0(
    board: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("commands")
    stand_in = folder / "python"
    stand_in.write_text(f"#!/bin/sh\ncat <<'END'\n{json.dumps(PROBED)}\nEND\n")
    stand_in.chmod(0o755)
    commands = spoken_folder(folder / "bin", orin_nano_says(PYTHON))
    done = run(
        "--root", str(board), "--commands", str(commands), "--python", str(stand_in), "--bs", "192.0.2.9", "--json"
    )
    told = json.loads(done.stdout)
    assert (done.returncode, done.stderr, told["warnings"], told["problems"]) == (FINE, "", [], [])
    assert told["board"]["module"] == "Jetson Orin Nano 8GB (developer kit)"
    assert (told["power"]["mode"], told["clocks"]["locked"]) == ("25W", True)
    assert (told["cuda"]["products_right"], told["wifi"][0]["power_save"]) == (True, False)
    assert told["route"]["interface"] == "wlP1p1s0"


def test_below_another_root_no_command_of_this_machine_is_asked(board: Path) -> None:
    done = run("--root", str(board), "--json")
    told = json.loads(done.stdout)
    assert done.returncode == WARNINGS
    assert (told["cuda"]["asked"], told["software"]["python"], told["power"]["mode"]) == (False, None, None)
    assert "not asked" in told["time"]["why_unknown"]


def test_jetpack_5_has_an_exit_code_of_its_own(board: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(board, {"etc/nv_tegra_release": "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref"})
    assert main(["--root", str(board)]) == PROBLEMS
    assert "not supported: Python 3.8" in capsys.readouterr().out


def test_people_get_a_line_a_part_and_then_what_is_wrong(board: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--root", str(board)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("board     Jetson Orin Nano 8GB")
    assert "25W" in next(line for line in lines if line.startswith("power"))
    assert lines[-1].endswith("warning(s)")


@pytest.mark.parametrize("wrong", [["--root", "/no/such/folder"], ["--nonsense"], ["--commands", "/no/such/folder"]])
def test_wrong_usage_is_exit_code_2(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(wrong)
    assert stopped.value.code == 2


def test_an_interrupt_ends_without_a_traceback(board: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("firmware_setup.preflight.examine", interrupted)
    assert main(["--root", str(board)]) == INTERRUPTED


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_python_3_8_can_read_every_file_and_each_needs_the_standard_library_only(source: Path) -> None:
    """So that a board of JetPack 5 can say that it is not supported."""
    tree = ast.parse(source.read_text(), feature_version=(3, 8))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    foreign = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"firmware_setup"}
    assert foreign <= ({"torch", "numpy"} if source.stem == "cuda_probe" else set())


GUIDE = (Path(__file__).parents[2] / "docs/hardware.md").read_text()


def test_the_guide_shows_what_preflight_prints(board: Path) -> None:
    shown = "\n".join(summary.lines(*checked(board, iw_save="Power save: on\n")))
    assert f"```text\n{shown}\n```" in GUIDE


def test_every_command_of_ours_in_the_guide_is_one() -> None:
    lines = [line.partition("-m firmware_setup.")[2] for line in GUIDE.replace("\\\n", "").splitlines()]
    commands = [line.replace("~", "/home").split() for line in lines if line]
    assert {words[0] for words in commands} == {"flash", "preflight"}
    parsers = {"flash": flash_parser, "preflight": preflight_parser}
    for name, *arguments in commands:
        parsers[name]().parse_args(arguments)  # leaves by SystemExit where it is none
