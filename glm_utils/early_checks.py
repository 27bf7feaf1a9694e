"""What is checked before torch is imported: models and adapters that a flag names, devices, sampling.

Importing torch, transformers and peft takes seconds; a wrong flag is answered in a fraction of one. So this file, and
whatever else a script imports at its top, imports none of them.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from glm_utils.cli import UserError
from glm_utils.family import FAMILIES, PROJECT_DIR, Family, detect_family
from glm_utils.model_files.adapter_config import read_adapter_config
from glm_utils.model_files.directory_kind import advice, directory_kind
from glm_utils.model_files.model_json import read_config

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 1000  # below, logits overflow; above, all are alike


def project_path(path: str | Path) -> Path:
    """Return a path as given or, if nothing is there, relative to the project's directory (for shipped files)."""
    path = Path(path).expanduser()
    return path if path.exists() or not (PROJECT_DIR / path).exists() else PROJECT_DIR / path


def local_model_dir(name_or_path: str | Path) -> Path | None:
    """Return the directory of a model; None for a hub id, which has to be downloaded.

    Args:
        name_or_path: Directory, or hub id such as THUDM/chatglm2-6b.

    Raises:
        UserError: Neither a directory nor a hub id.
    """
    path, name = project_path(name_or_path), str(name_or_path)
    if path.is_dir():
        return path.resolve()
    if path.is_file():
        raise UserError(f"{name}: not a model. {advice(path)}")
    known = [hub_id for family in FAMILIES for hub_id in (*family.hub_ids, *family.modelscope_ids)]
    is_hub_id = HUB_ID.fullmatch(name) and not path.exists() and not path.parent.is_dir()
    if is_hub_id or name in known:
        return None
    raise UserError(f"{name}: no such directory, and not a hub id either. Known hub ids: {', '.join(known)}")


def check_model_dir(name_or_path: str | Path) -> Family | None:
    """Check that a directory, unless it is a hub id, holds the config.json of a known family.

    Returns:
        The family; None: a hub id that is not a published one, so that only its config.json will tell.

    Raises:
        UserError: Neither a directory nor a hub id, no config.json, or one of an unknown family.
    """
    directory = local_model_dir(name_or_path)
    if directory:
        if directory_kind(directory) not in ("model", "adapter", "unknown"):
            raise UserError(f"{name_or_path}: not a model that this project loads. {advice(directory)}")
        return detect_family(read_config(directory), directory / "config.json")
    return next((family for family in FAMILIES if str(name_or_path) in family.hub_ids), None)


def check_model_path(model_path: str) -> None:
    """Check --model_path of a command that takes adapters too, as --lora_path.

    Raises:
        UserError: See `check_model_dir`; a LoRA adapter is told its flag.
    """
    path = project_path(model_path)
    if directory_kind(path) == "adapter":
        raise UserError(f"--model_path {model_path}: not a model. {advice(path)}")
    check_model_dir(path if path.exists() else model_path)


def check_model_choice(model_path: str | None, lora_path: str | None) -> None:
    """Check the flags that name a base or merged model, or an adapter with the base that it names.

    Args:
        model_path: Directory or hub id of a base or merged model.
        lora_path: Directory of an adapter, instead.

    Raises:
        UserError: Neither is given, both are, or what is given is not such a directory.
    """
    if bool(model_path) == bool(lora_path):
        found = "both are given" if model_path else "neither is given"
        raise UserError(f"{found}: give --model_path DIR, or --lora_path DIR, which names its base itself")
    if lora_path:
        read_adapter_config(Path(lora_path).expanduser())
        return
    check_model_path(str(model_path))


def check_number_of_models(model_paths: Sequence[str], lora_path: str | None) -> None:
    """Check that a comparison has two sides.

    Raises:
        UserError: A number of models other than two in all.
    """
    if len(model_paths) not in ((0, 1) if lora_path else (2,)):
        raise UserError(
            f"--lora_path {lora_path}, --model_path {','.join(model_paths) or None}: expected an adapter (its base "
            "without and with it), an adapter and the model it was merged to, or two models joined by a comma"
        )


def check_device_name(device: str) -> None:
    """Refuse a --device that is not auto, cpu, cuda or cuda:N; whether it is there, `resolve_device` finds out.

    Raises:
        UserError: Another name.
    """
    if not DEVICE.fullmatch(device):
        raise UserError(f"--device {device}: expected auto, cpu or cuda:N")


def check_seed(seed: int | None) -> None:
    """Refuse a --seed that torch does not take.

    Raises:
        UserError: A negative number, or one of more than 64 bits.
    """
    if seed is not None and not 0 <= seed < 2**64:
        raise UserError(f"--seed {seed}: expected 0 to {2**64 - 1}")


def check_sampling(temperature: float | None, top_p: float | None) -> None:
    """Refuse sampling parameters that define no distribution.

    Args:
        temperature: Divides the logits; 0: always the most probable token; None: the default.
        top_p: Nucleus probability; None: the default.

    Raises:
        UserError: A value is out of range.
    """
    if temperature and not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise UserError(
            f"--temperature {temperature}: expected 0 (most probable token), or {MIN_TEMPERATURE} to {MAX_TEMPERATURE}"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"--top_p {top_p}: expected more than 0 and at most 1")
