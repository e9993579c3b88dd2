"""The flash command against a USB tree and an unpacked BSP written by hand (synthetic). No board was flashed."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
from firmware_boards import write
from hypothesis import given
from hypothesis import strategies as st

from firmware_setup.flash.__main__ import DONE, FAILED, REFUSED, main
from firmware_setup.flash.boards import RECOVERY, TARGETS, RefusedError, conf_of, flash_command
from firmware_setup.flash.usb import find_boards
from firmware_setup.machine import Machine

NVME = (
    "sudo ./tools/kernel_flash/l4t_initrd_flash.sh --external-device nvme0n1p1 "
    "-c tools/kernel_flash/flash_l4t_t234_nvme.xml"
)
QSPI = "-p '-c bootloader/generic/cfg/flash_t234_qspi.xml' --showlogs --network usb0"
COMMANDS = [
    ("orin-nano --release 36.4.3", f"{NVME} {QSPI} jetson-orin-nano-devkit internal"),
    ("orin-nano --release 36.4.3 --super", f"{NVME} {QSPI} jetson-orin-nano-devkit-super internal"),
    ("orin-nx --release 36.5.0 --super", f"{NVME} {QSPI} jetson-orin-nano-devkit-super internal"),
    ("agx-orin --release 36.4.3", "sudo ./flash.sh jetson-agx-orin-devkit internal"),
    ("agx-orin --release 36.4.3 --storage nvme", f"{NVME} --showlogs --network usb0 jetson-agx-orin-devkit external"),
    ("agx-thor --release 38.4.0", "sudo ./l4t_initrd_flash.sh jetson-agx-thor-devkit internal"),
    ("agx-thor --release 39.2.1", "sudo ./l4t_initrd_flash.sh jetson-agx-thor-devkit internal"),
]
REFUSALS = [
    ("orin-nano --release 35.4.1", "not supported: Python 3.8"),
    ("orin-nano --release 38.4.0", "for Thor only"),
    ("orin-nano --release 39.2.1", "no command is known"),
    ("orin-nano --release tomorrow", "is no L4T"),
    ("agx-thor --release 36.4.3", "no command is known"),
    ("orin-nano --release 36.4.3 --storage emmc", "--storage emmc is not known"),
    ("agx-orin --release 36.4.3 --super", "no super mode"),
    ("orin-nano --release 36.4.3 --user Root --hostname jetson-0 --password-file f", "--user"),
    ("orin-nano --release 36.4.3 --user wdmoe --hostname a;b --password-file f", "--hostname"),
]
LOGIN = "--user wdmoe --hostname jetson-0 --password-file"
SCRIPTS = ("tools/l4t_flash_prerequisites.sh", "apply_binaries.sh", "tools/l4t_create_default_user.sh",
           "tools/kernel_flash/l4t_initrd_flash.sh")  # fmt: skip


def usb(root: Path, *products: str, vendor: str = "0955") -> Path:
    files = {}
    for port, product in enumerate(products):
        folder = f"sys/bus/usb/devices/3-{port}"
        files.update({f"{folder}/idVendor": f"{vendor}\n", f"{folder}/idProduct": f"{product}\n"})
    return write(root, files)


@pytest.fixture
def bsp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An unpacked Jetson Linux whose scripts, and sudo, only say what they were called with."""
    folder, board_file = tmp_path / "Linux_for_Tegra", "jetson-orin-nano-devkit.conf"
    said = f'echo "$(basename "$0") $*" >> {tmp_path}/said\n'
    scripts = dict.fromkeys(SCRIPTS, f"#!/bin/sh\n{said}")
    write(folder, {**scripts, board_file: "", "rootfs/etc/x": ""})
    write(tmp_path, {"bin/sudo": '#!/bin/sh\nexec "$@"\n', "password": "correct horse\n"})
    for path in (*(folder / name for name in SCRIPTS), tmp_path / "bin/sudo"):
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    return folder


def execute(bsp: Path, typed: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    login = [*LOGIN.split(), str(bsp.parent / "password")]
    base = ["orin-nano", "--release", "36.4.3", "--bsp", str(bsp), "--root", str(bsp.parent / "usb"), *login]
    return main([*base, "--execute", *more])


def said(bsp: Path) -> list[str]:
    path = bsp.parent / "said"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(("asked", "command"), COMMANDS)
def test_each_board_and_release_has_its_exact_command(
    tmp_path: Path, asked: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*asked.split(), "--root", str(tmp_path)]) == DONE
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == command
    assert "not yet run on hardware" in out


@pytest.mark.parametrize(("asked", "words"), REFUSALS)
def test_what_must_not_or_cannot_be_flashed_is_refused_and_no_command_printed(
    tmp_path: Path, asked: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*asked.split(), "--root", str(tmp_path)]) == REFUSED
    told = capsys.readouterr()
    assert told.out == ""
    assert words in told.err


@pytest.mark.parametrize("product", sorted(RECOVERY))
def test_only_the_board_that_was_named_is_accepted_in_recovery_mode(
    tmp_path: Path, product: str, capsys: pytest.CaptureFixture[str]
) -> None:
    usb(tmp_path, product)
    releases = {"agx-thor": "38.4.0"}
    taken = [n for n in TARGETS if main([n, "--release", releases.get(n, "36.4.3"), "--root", str(tmp_path)]) == DONE]
    assert taken == [name for name, target in TARGETS.items() if product in target.products]
    assert len(taken) <= 1
    if not taken:
        assert f"is {RECOVERY[product]} ({product}), not" in capsys.readouterr().err


def test_boards_on_usb_are_listed_and_other_things_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(usb(tmp_path, "7523", "7020", "7fff"), {"sys/bus/usb/devices/1-1/idVendor": "046d\n"})
    assert [board.state for board in find_boards(Machine(tmp_path))] == ["recovery", "running", "unknown"]
    main(["--root", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)["boards"][0] == {
        "place": "3-0", "product": "7523", "state": "recovery", "module": "Jetson Orin Nano 8GB",
    }  # fmt: skip
    main(["--root", str(tmp_path / "none")])
    assert "no NVIDIA board on USB" in capsys.readouterr().out


@pytest.mark.parametrize("typed", ["", "yes\n", "orin-nx\n", "ORIN-NANO\n"])
def test_nothing_is_run_before_the_boards_name_is_typed(
    bsp: Path, typed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usb(bsp.parent / "usb", "7523")
    assert execute(bsp, typed, monkeypatch) == REFUSED
    assert said(bsp) == []
    assert "nothing was done" in capsys.readouterr().err


def test_once_it_is_typed_the_steps_are_run_in_order(bsp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usb(bsp.parent / "usb", "7523")
    assert execute(bsp, "orin-nano\n", monkeypatch) == DONE
    assert [line.split()[0] for line in said(bsp)] == [Path(name).name for name in SCRIPTS]
    assert said(bsp)[2] == "l4t_create_default_user.sh -u wdmoe -p correct horse -n jetson-0 --accept-license"


def test_the_password_is_in_nothing_that_is_printed(
    bsp: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    usb(bsp.parent / "usb", "7523")
    execute(bsp, "orin-nano\n", monkeypatch)
    told = capfd.readouterr()
    assert "horse" not in told.out + told.err
    assert f'-p "$(cat {bsp.parent}/password)"' in told.out


def test_a_step_that_fails_is_the_last_one(bsp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usb(bsp.parent / "usb", "7523")
    (bsp / "apply_binaries.sh").write_text("#!/bin/sh\nexit 7\n")
    assert execute(bsp, "orin-nano\n", monkeypatch) == FAILED
    assert len(said(bsp)) == 1


def test_a_board_that_was_swapped_while_the_image_was_made_is_not_flashed(
    bsp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = usb(bsp.parent / "usb", "7523")
    (bsp / "apply_binaries.sh").write_text(f"#!/bin/sh\necho 7323 > {root}/sys/bus/usb/devices/3-0/idProduct\n")
    assert execute(bsp, "orin-nano\n", monkeypatch) == REFUSED
    assert "Jetson Orin NX 16GB" in capsys.readouterr().err
    assert not [line for line in said(bsp) if "l4t_initrd_flash" in line]


@pytest.mark.parametrize("products", [(), ("7020",), ("7523", "7523"), ("7323",)])
def test_execution_wants_one_board_and_the_right_one(
    bsp: Path, products: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    usb(bsp.parent / "usb", *products)
    assert execute(bsp, "orin-nano\n", monkeypatch) == REFUSED
    assert said(bsp) == []


def test_a_bsp_of_another_release_or_without_its_parts_is_refused(
    bsp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usb(bsp.parent / "usb", "7523")
    write(bsp, {"rootfs/etc/nv_tegra_release": "# R36 (release), REVISION: 4.7, GCID: 1"})
    assert execute(bsp, "orin-nano\n", monkeypatch, "--super") == REFUSED
    told = capsys.readouterr().err
    assert "holds L4T 36.4.7, not 36.4.3" in told
    assert "missing jetson-orin-nano-devkit-super.conf" in told
    assert said(bsp) == []


@pytest.mark.parametrize("content", ["", "\n", "a\nb\n", "x" * 200, "bell\a"])
def test_a_password_that_is_none_is_refused_before_anything_runs(
    bsp: Path, content: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usb(bsp.parent / "usb", "7523")
    (bsp.parent / "password").write_text(content)
    assert execute(bsp, "orin-nano\n", monkeypatch) == REFUSED
    assert "one printable line" in capsys.readouterr().err
    assert said(bsp) == []


@pytest.mark.parametrize(
    "wrong",
    ["orin-nano", "pi-5 --release 36.4.3", f"orin-nano --release 36.4.3 {LOGIN.rpartition(' ')[0]}",
     "orin-nano --release 36.4.3 --execute --json"],
)  # fmt: skip
def test_wrong_usage_is_exit_code_2(wrong: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(wrong.split())
    assert stopped.value.code == 2


def test_the_plan_as_json_says_that_no_hardware_has_seen_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["agx-orin", "--release", "36.4.3", "--root", str(tmp_path), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (told["board"], told["jetpack"], told["run_on_hardware"]) == ("agx-orin", "6.2", False)
    assert told["commands"][-1] == "sudo ./flash.sh jetson-agx-orin-devkit internal"
    assert any("0 boards in recovery mode" in obstacle for obstacle in told["obstacles"])


@given(
    st.sampled_from(sorted(TARGETS)),
    st.one_of(st.text(max_size=12), st.from_regex("36[.][0-9]+.?[0-9]*")),
    st.sampled_from(["nvme", "emmc"]),
    st.booleans(),
)
def test_a_release_however_it_is_written_gives_a_command_or_a_refusal_and_is_in_no_command(
    name: str, release: str, storage: str, super_mode: bool
) -> None:
    target = TARGETS[name]
    with contextlib.suppress(RefusedError):
        words = flash_command(target, release, storage, conf_of(target, super_mode))
        assert release.isascii()
        assert release.isprintable()
        assert release not in words


@given(st.binary(max_size=40))
def test_hostile_usb_ids_are_passed_over(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    folder = "sys/bus/usb/devices/1-1"
    root = write(
        tmp_path_factory.getbasetemp() / "hostile-usb", {f"{folder}/idVendor": "0955", f"{folder}/idProduct": raw}
    )
    assert all(len(board.product) == 4 for board in find_boards(Machine(root)))
