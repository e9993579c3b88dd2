"""Where a checkpoint comes from: a folder, or the hub by name, at one revision."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from testbed.errors import CheckpointError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
SMALL = ("*.json", "tokenizer*", "*.model", "vocab*", "merges.txt", "*.jinja")
CODE = ("*.py",)


def model_folder(model: str, *, revision: str | None = None, trusted: str | None = None) -> Path:
    """The folder of a checkpoint, downloaded where `model` is a name on the hub, resuming what was begun.

    revision: commit, tag or branch on the hub. trusted: the model whose own code may run, named as `model` is.
    Raises CheckpointError where there is no such folder or model, or the hub is out of reach.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"{model}: a folder has no --revision; leave it out")
    elif HUB_NAME.fullmatch(model):
        folder = _download(model, revision, SMALL + (CODE if trusted == model else ()))
    else:
        raise CheckpointError(f"{model}: no such folder, and no name of a model on the hub (OWNER/NAME)")
    allow_own_code(folder, model, trusted)
    return folder


def _download(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - a folder needs none of it
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RevisionNotFoundError  # noqa: PLC0415

    from testbed.checkpoint.tensor_files import weight_file_names  # noqa: PLC0415

    lost: Any = (*HfHubHTTPError.__bases__, ValueError)  # OSError, and the error of its HTTP client, whichever that is
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
        commit = folder.name  # both downloads are of one commit, whatever the branch does meanwhile
        return Path(snapshot_download(name, revision=commit, allow_patterns=[*patterns, *weight_file_names(folder)]))
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name}: no revision {revision} on the hub; see its list of commits") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name}: the hub is out of reach, and its cache here does not have all of it; go online, or name a folder"
        ) from error
    except HfHubHTTPError as error:
        reason = str(error.response.status_code if error.response is not None else "no answer")
        raise CheckpointError(
            f"{name}: the hub refused it (HTTP {reason}): no such model, or one to log in for (`hf auth login`)"
        ) from error
    except lost as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{name}: download failed ({reason:.120}); start it again, it goes on") from error


def allow_own_code(folder: Path, model: str, trusted: str | None) -> None:
    """Registers a model's own code with transformers if it was named as trusted; nothing where it has none.

    Raises CheckpointError for a model that transformers does not know and that nobody trusted by name.
    """
    config = _config(folder)
    own = config.get("auto_map")
    if not own or not isinstance(own, dict):
        return
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM  # noqa: PLC0415
    from transformers.dynamic_module_utils import get_class_from_dynamic_module  # noqa: PLC0415

    if config.get("model_type") in CONFIG_MAPPING:
        return  # transformers has this family itself
    if trusted != model:
        raise CheckpointError(
            f"{model}: needs code of its own ({config.get('model_type')}), which would run here with your rights; read "
            f"it, and allow it by name: --trust-remote-code {model}"
        )
    try:
        config_class: Any = get_class_from_dynamic_module(own["AutoConfig"], str(folder))
        model_class: Any = get_class_from_dynamic_module(own["AutoModelForCausalLM"], str(folder))
    except (KeyError, OSError, ImportError, AttributeError) as error:
        raise CheckpointError(f"{model}: its own code cannot be loaded ({error!s:.120})") from error
    AutoConfig.register(config["model_type"], config_class)
    AutoModelForCausalLM.register(config_class, model_class)


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}  # who reads it for good says what is wrong with it
    return config if isinstance(config, dict) else {}
