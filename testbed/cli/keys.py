"""`testbed keys`: lasting keys for a rack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example: testbed keys ~/wdmoe-keys jetson-0 jetson-1"


def command(
    folder: Annotated[Path, typer.Argument(help="New folder for all of them.", show_default=False)],
    devices: Annotated[list[str], typer.Argument(help="Names of the devices.", show_default=False)],
) -> None:
    """Make CURVE keys for a base station and its devices.

    FOLDER/bs stays here ([fleet] keys = "FOLDER"); FOLDER/NAME goes to the device NAME (testbed node --keys).
    """
    from testbed.errors import ConfigError
    from testbed.wire.keys import make_run_keys

    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: is not empty: name a new folder, keys are never overwritten")
    make_run_keys(folder, devices)
    for device in devices:
        print(f"{folder / device} -> {device}")
