"""Models that bring code of their own: it runs with the user's rights, so only where the user named the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from testbed.errors import CheckpointError

CODE = "*.py"


def allow_own_code(folder: Path, name: str, trusted: str | None) -> bool:
    """Registers a model's own classes with transformers if `trusted` is its name. Whether it has any.

    A family that transformers has itself needs none, and what the folder says of its own is not looked at.
    Raises CheckpointError for a model that nobody allowed, and for code that fails.
    """
    config = _config(folder)
    own = config.get("auto_map")
    if not isinstance(own, dict) or not own:
        return False
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415 - most models need none of it
    from transformers.dynamic_module_utils import get_class_from_dynamic_module  # noqa: PLC0415
    from transformers.models.auto import configuration_auto as known  # noqa: PLC0415

    family = config.get("model_type")
    if family in known.CONFIG_MAPPING_NAMES:  # type: ignore[attr-defined]
        return False
    if trusted != name:
        raise CheckpointError(
            f"{name}: needs code of its own ({family}), which would run here with your rights; read it, and allow it "
            f'by name: --trust-remote-code {name}, or trust_remote_code = "{name}" in [model] of the run file'
        )
    for reference in own.values():
        if "--" in str(reference):  # as transformers writes OWNER/NAME--file.Class
            raise CheckpointError(
                f"{name}: its code is in another repository ({reference!s:.100}); copy it to this one"
            )
    try:
        config_class: Any = get_class_from_dynamic_module(own["AutoConfig"], str(folder))
        model_class: Any = get_class_from_dynamic_module(own["AutoModelForCausalLM"], str(folder))
        AutoConfig.register(family, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    except Exception as error:  # what foreign code raises can be anything
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise CheckpointError(f"{name}: its own code cannot be loaded ({reason:.160})") from error
    return True


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}  # who reads it for good says what is wrong with it
    return config if isinstance(config, dict) else {}
