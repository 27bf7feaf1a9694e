"""Check the files of a checkpoint before a model is built: LFS pointers, truncation, missing shards, wrong directory.

No weight is read: headers, sizes and indexes are enough to refuse a broken 13 GB download within a second.
"""

import hashlib
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from glm_utils.adapter_config import AdapterConfig, check_inside, read_adapter_config
from glm_utils.cli import UserError
from glm_utils.family import Family
from glm_utils.files import LFS_MAGIC, download_again, read_json_object

WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")  # each alone, or sharded with <name>.index.json
ADAPTER_WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
LEGACY_PICKLE_MAGIC = b"\x80\x02"  # torch.save before the zip format (torch < 1.6)
SAMPLE_BYTES = 1 << 16


def read_config(checkpoint_dir: Path) -> dict:
    """Read config.json of a model directory.

    Raises:
        UserError: It is missing or broken. If the directory is a LoRA adapter, the message names its base.
    """
    config_path, adapter_config_path = checkpoint_dir / "config.json", checkpoint_dir / "adapter_config.json"
    if config_path.is_file():
        return read_json_object(config_path)
    if adapter_config_path.is_file():
        base = read_json_object(adapter_config_path).get("base_model_name_or_path")
        raise UserError(f"{checkpoint_dir}: a LoRA adapter, not a base model. Give its base: {base!r}")
    raise UserError(f"{config_path} is missing: not a model directory. Give a complete checkpoint directory")


def check_checkpoint_files(checkpoint_dir: Path, config: dict, family: Family) -> None:
    """Check that a directory holds a complete model: weights and vocabulary.

    Args:
        checkpoint_dir: The directory.
        config: Its parsed config.json.
        family: The model's family.

    Raises:
        UserError: A P-tuning checkpoint, or a file that is missing, a Git LFS pointer or truncated.
    """
    if config.get("pre_seq_len"):
        raise UserError(
            f"{checkpoint_dir / 'config.json'}: pre_seq_len {config['pre_seq_len']} marks a P-tuning checkpoint, and "
            f"prefix tuning is not part of this project. Give the base model it was tuned from, e.g. "
            f"{family.hub_ids[0]}"
        )
    for path in weight_files(checkpoint_dir):
        check_file(path)
    check_file(checkpoint_dir / family.tokenizer_file)


def weight_files(checkpoint_dir: Path) -> list[Path]:
    """List the weight files of a base model; safetensors are preferred to .bin files.

    Raises:
        UserError: No weights, or a broken index. A missing shard is listed too; `check_file` finds it.
    """
    for name in WEIGHT_NAMES:
        index_path = checkpoint_dir / f"{name}.index.json"
        if (checkpoint_dir / name).is_file():
            return [checkpoint_dir / name]
        if index_path.is_file():
            weight_map = read_json_object(index_path).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(f"{index_path}: weight_map is missing or empty. {download_again(index_path)}")
            return [checkpoint_dir / shard for shard in sorted(set(weight_map.values()))]
    names = " or ".join([*WEIGHT_NAMES, *(f"{name}.index.json" for name in WEIGHT_NAMES)])
    raise UserError(f"{checkpoint_dir}: no weights. Expected {names}; download the checkpoint completely")


def check_adapter_files(adapter_dir: Path) -> AdapterConfig:
    """Check that a directory holds a complete LoRA adapter.

    Args:
        adapter_dir: Directory with adapter_config.json and adapter_model.safetensors or .bin.

    Returns:
        Its checked settings.

    Raises:
        UserError: Another kind of adapter, a setting that is out of range, or a file that is missing, a Git LFS
            pointer, truncated or a link out of the directory.
    """
    config = read_adapter_config(adapter_dir)
    check_file(adapter_weights(adapter_dir))
    return config


def adapter_weights(adapter_dir: Path) -> Path:
    """Return the file of an adapter's weights; safetensors are preferred to a .bin file.

    Raises:
        UserError: There is none, or it is a link out of the directory.
    """
    found = [adapter_dir / name for name in ADAPTER_WEIGHT_NAMES if (adapter_dir / name).is_file()]
    if not found:
        raise UserError(f"{adapter_dir}: no {' or '.join(ADAPTER_WEIGHT_NAMES)}. Was the training interrupted?")
    check_inside(found[0])
    return found[0]


def check_file(path: Path) -> None:
    """Check that a binary file exists, is not a Git LFS pointer and is not truncated.

    Args:
        path: A .safetensors, .bin or sentencepiece file.

    Raises:
        UserError: It is missing, a pointer, empty or truncated.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file. {download_again(path)}")
    with path.open("rb") as file:
        head = file.read(len(LFS_MAGIC))
    if head.startswith(LFS_MAGIC):
        raise UserError(f"{path}: a Git LFS pointer ({path.stat().st_size} bytes), not the file. Run `git lfs pull`")
    if not head:
        raise UserError(f"{path}: empty file. {download_again(path)}")
    if path.suffix == ".safetensors":
        _check_safetensors(path)
    elif path.suffix == ".bin" and not head.startswith(LEGACY_PICKLE_MAGIC) and not zipfile.is_zipfile(path):
        raise UserError(f"{path}: truncated ({path.stat().st_size} bytes, no end of archive). {download_again(path)}")


def _check_safetensors(path: Path) -> None:
    """Check that a safetensors file has a valid header, and as many bytes as the header says."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        num_bytes = path.stat().st_size
        raise UserError(
            f"{path}: broken or truncated safetensors file of {num_bytes} bytes ({error}). {download_again(path)}"
        ) from None


def fingerprint(checkpoint_dir: Path) -> str:
    """Hash a base model's config, and the name, the size and three samples of each weight file.

    Revisions of a model have weights of the same size; the samples tell them apart without reading 13 GB.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256((checkpoint_dir / "config.json").read_bytes())
    for path in weight_files(checkpoint_dir):
        num_bytes = path.stat().st_size
        digest.update(f"{path.name} {num_bytes}\n".encode())
        with path.open("rb") as file:
            for start in (0, num_bytes // 2, max(0, num_bytes - SAMPLE_BYTES)):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
