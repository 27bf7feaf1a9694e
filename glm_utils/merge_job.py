"""Resolve the arguments of a merge (adapter, base, remote scripts, device) and refuse what cannot be merged."""

from pathlib import Path

import torch
from loguru import logger

from glm_utils.checkpoint import load_config, resolve_checkpoint_dir
from glm_utils.checkpoint_files import check_checkpoint, fingerprint
from glm_utils.cli import UserError
from glm_utils.family import FAMILIES, Family, detect_family
from glm_utils.lora import Adapter
from glm_utils.merge import MergeJob
from glm_utils.shards import CheckpointReader

CONFIG_SCRIPT = "configuration_chatglm.py"
SCRIPTS = (CONFIG_SCRIPT, "modeling_chatglm.py", "tokenization_chatglm.py", "quantization.py")


def resolve_device(device: str) -> torch.device:
    """Turn the device argument into a device.

    Args:
        device: auto (the first GPU, else the CPU), cpu, cuda or cuda:N.

    Raises:
        UserError: No such device.
    """
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device}: expected auto, cpu or cuda:N") from None
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: there are {torch.cuda.device_count()} CUDA devices. Use auto or cpu")
    if resolved.type not in ("cuda", "cpu"):
        raise UserError(f"--device {device}: expected auto, cpu or cuda:N")
    return resolved


def find_base(adapter: Adapter) -> Path:
    """Find the base model that an adapter names, and check that it is the one it was trained on.

    Args:
        adapter: The adapter.

    Returns:
        The checked directory of the base.

    Raises:
        UserError: The base cannot be found, is broken, or is another revision.
    """
    try:
        base_dir = resolve_checkpoint_dir(adapter.base_name)
    except UserError as error:
        raise UserError(
            f"the base model of {adapter.directory} cannot be found. {error}. If the base has moved, write its path "
            f"to base_model_name_or_path in {adapter.directory / 'adapter_config.json'}"
        ) from error
    config = check_checkpoint(base_dir)
    if config.get("quantization_bit"):
        raise UserError(
            f"{base_dir / 'config.json'}: the base is quantised (quantization_bit {config['quantization_bit']}), and "
            "an update cannot be added to integer weights. Train on the fp16 checkpoint, or set "
            "base_model_name_or_path in adapter_config.json to it; --qbits quantises the merged model"
        )
    trained_on = adapter.run_config.get("identity", {}).get("base_fingerprint")
    if trained_on and trained_on != fingerprint(base_dir):
        raise UserError(
            f"{base_dir} is not what {adapter.directory} was trained on: its fingerprint is {fingerprint(base_dir)}, "
            f"run_config.json recorded {trained_on}. Restore that revision of the base, or train on this one"
        )
    if not trained_on:
        logger.warning(f"{adapter.directory} has no run_config.json: its base is taken to be {base_dir} unchanged")
    return base_dir


def find_scripts(remote_scripts_dir: str | None, family: Family) -> Path:
    """Return the remote scripts that go with the model.

    Args:
        remote_scripts_dir: A directory, or None for this project's own of the family.
        family: The base model's family.

    Raises:
        UserError: Not a directory of remote scripts, or another family's.
    """
    if remote_scripts_dir is None:
        return family.remote_dir
    path = Path(remote_scripts_dir).expanduser().resolve()
    missing = [name for name in SCRIPTS if not (path / name).is_file()]
    if missing:
        raise UserError(f"--remote_scripts_dir {path}: no {missing[0]} in it. Expected a copy of {family.remote_dir}")
    text = (path / CONFIG_SCRIPT).read_text(encoding="utf-8")
    found = [known.title for known in FAMILIES if all(marker in text for marker in known.config_markers)]
    if found != [family.title]:
        names = " and ".join(found) or "no known family"
        raise UserError(
            f"--remote_scripts_dir {path}: scripts of {names}, the base model is {family.title}. Leave the flag out, "
            f"or give a copy of {family.remote_dir}"
        )
    return path


def nf4_dtype(run_config: dict) -> torch.dtype:
    """Return the dtype that the base weights had when training quantised them to NF4.

    Only bf16 differs: fp32 and fp16 hold the same values of an fp16 checkpoint.

    Args:
        run_config: What train_qlora.py recorded.
    """
    on_cpu = run_config.get("training_args", {}).get("use_cpu")
    is_bf16 = run_config.get("arguments", {}).get("compute_dtype") == "bf16"
    return torch.bfloat16 if is_bf16 and not on_cpu else torch.float32


def make_job(
    adapter: Adapter, base_dir: Path, qbits: int, device: torch.device, scripts_dir: str | None, merge_base: str
) -> MergeJob:
    """Put a merge together from checked parts.

    Args:
        adapter: The adapter.
        base_dir: Its base.
        qbits: 0, 4 or 8.
        device: Where to work.
        scripts_dir: Remote scripts; None: the family's own.
        merge_base: "original" or "nf4".

    Raises:
        UserError: Parts that do not fit each other.
    """
    config = check_checkpoint(base_dir)
    family = detect_family(config, base_dir / "config.json")
    load_config(base_dir)
    return MergeJob(
        base_dir=base_dir,
        base_config=config,
        family=family,
        adapter=adapter,
        scripts_dir=find_scripts(scripts_dir, family),
        bits=qbits,
        device=device,
        merge_base=merge_base,
        nf4_dtype=nf4_dtype(adapter.run_config),
        reader=CheckpointReader(base_dir),
    )
