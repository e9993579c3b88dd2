"""Run files as texts: the least one and what is added to it, loaded, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.config import RunConfig, load_run_file
from testbed.errors import ConfigError

DEVICE = '[[device]]\nname = "jetson-0"\n'
TOPK = '[[policy]]\nname = "topk"\n'
LEAST = f'name = "small"\n{DEVICE}{TOPK}'
PLACED = "[radio]\n[radio.placement]\n"


def load(folder: Path, text: str, *overrides: str) -> RunConfig:
    file = folder / "run.toml"
    file.write_text(text)
    return load_run_file(file, overrides)


def with_devices(*more: str) -> str:
    """Devices jetson-0, jetson-1, ..., each with these lines besides its name."""
    devices = "".join(f'[[device]]\nname = "jetson-{n}"\n{lines}\n' for n, lines in enumerate(more))
    return f'name = "small"\n{devices}{TOPK}'


def throttled(device: str) -> str:
    return f'[[throttle]]\ndevice = "{device}"\nfrom_prompt = 0\nuntil_prompt = 1\n'


def refusal(folder: Path, text: str, *overrides: str) -> str:
    """The one line that a run file is refused with, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert line.startswith(f"{folder / 'run.toml'}: ")
    return line.removeprefix(f"{folder / 'run.toml'}: ")
