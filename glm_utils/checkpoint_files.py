"""Check the files of a checkpoint before a model is built: pointers, truncation, missing shards, wrong directory.

Split from checkpoint.py, which loads. Nothing here reads a weight: headers, sizes and indexes are enough, so a
broken 13 GB download is refused within a second.
"""

import hashlib
import json
import zipfile
from pathlib import Path

from glm_utils.cli import JSON_ERRORS, UserError, json_fault
from glm_utils.family import detect_family

LFS_MAGIC = b"version https://git-lfs"
WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")  # each alone, or sharded with <name>.index.json
ADAPTER_WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
LEGACY_PICKLE_MAGIC = b"\x80\x02"  # torch.save before the zip format (torch < 1.6)
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
SAMPLE_BYTES = 1 << 16


def check_checkpoint(checkpoint_dir: Path) -> dict:
    """Check that a directory holds a complete base model of a known family.

    Args:
        checkpoint_dir: Directory with config.json, weights and the tokenizer's vocabulary.

    Returns:
        The parsed config.json.

    Raises:
        UserError: What is wrong, with the file and the remedy.
    """
    config_path = checkpoint_dir / "config.json"
    if not config_path.is_file():
        adapter_config = checkpoint_dir / "adapter_config.json"
        if adapter_config.is_file():
            base = read_json_object(adapter_config).get("base_model_name_or_path")
            raise UserError(f"{checkpoint_dir}: a LoRA adapter, not a base model. Give its base: {base!r}")
        raise UserError(f"{config_path}: no such file, so this is no model. Give a complete checkpoint directory")
    config = read_json_object(config_path)
    family = detect_family(config, config_path)
    if config.get("pre_seq_len"):
        raise UserError(
            f"{config_path}: pre_seq_len {config['pre_seq_len']} marks a P-tuning checkpoint, and prefix tuning is no "
            f"part of this project. Give the base model it was tuned from, e.g. {family.hub_ids[0]}"
        )
    for path in weight_files(checkpoint_dir):
        check_file(path)
    check_file(checkpoint_dir / family.tokenizer_file)
    return config


def weight_files(checkpoint_dir: Path) -> list[Path]:
    """List the weight files of a base model, safetensors before .bin.

    Args:
        checkpoint_dir: The model's directory.

    Raises:
        UserError: No weights, or a broken index; a shard that is missing is listed and found by `check_file`.
    """
    for name in WEIGHT_NAMES:
        index_path = checkpoint_dir / f"{name}.index.json"
        if (checkpoint_dir / name).is_file():
            return [checkpoint_dir / name]
        if index_path.is_file():
            weight_map = read_json_object(index_path).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(f"{index_path}: no weight_map in it. {download_again(index_path)}")
            return [checkpoint_dir / shard for shard in sorted(set(weight_map.values()))]
    names = " or ".join([*WEIGHT_NAMES, *(f"{name}.index.json" for name in WEIGHT_NAMES)])
    raise UserError(f"{checkpoint_dir}: no weights. Expected {names}; download the checkpoint completely")


def check_adapter(adapter_dir: Path) -> dict:
    """Check that a directory holds a complete LoRA adapter.

    Args:
        adapter_dir: Directory with adapter_config.json and adapter_model.safetensors or .bin.

    Returns:
        The parsed adapter_config.json.

    Raises:
        UserError: What is wrong, with the file and the remedy.
    """
    config_path = adapter_dir / "adapter_config.json"
    if not config_path.is_file():
        raise UserError(f"{config_path}: no such file, so this is no LoRA adapter. Give the output_dir of a training")
    config = read_json_object(config_path)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{config_path}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    found = [adapter_dir / name for name in ADAPTER_WEIGHT_NAMES if (adapter_dir / name).is_file()]
    if not found:
        raise UserError(f"{adapter_dir}: no {' or '.join(ADAPTER_WEIGHT_NAMES)}. Was the training interrupted?")
    check_file(found[0])
    return config


def check_file(path: Path) -> None:
    """Check one binary file: there, no Git LFS pointer, not cut short.

    Args:
        path: A .safetensors, .bin or sentencepiece file.

    Raises:
        UserError: What is wrong, with the remedy.
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
        raise UserError(f"{path}: cut short ({path.stat().st_size} bytes, no end of archive). {download_again(path)}")


def _check_safetensors(path: Path) -> None:
    """Compare a safetensors file's size with its header. Source: the safetensors format (u64 length, JSON, data)."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if num_bytes < 8 or header_bytes > MAX_HEADER_BYTES:
            raise UserError(f"{path}: no safetensors file. {download_again(path)}")
        header_text = file.read(header_bytes)
    try:
        header = json.loads(header_text)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: broken safetensors header ({num_bytes} bytes). {download_again(path)}") from None
    expected = 8 + header_bytes + max(ends, default=0)
    if num_bytes != expected:
        raise UserError(f"{path}: {num_bytes} bytes, its header promises {expected}. {download_again(path)}")


def read_json_object(path: Path) -> dict:
    """Read a JSON file that holds one object.

    Args:
        path: The file.

    Raises:
        UserError: Missing, a Git LFS pointer, broken, or something else than an object, with the line.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. {download_again(path)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}). {download_again(path)}") from None
    except JSON_ERRORS as error:
        if path.read_bytes().startswith(LFS_MAGIC):
            raise UserError(f"{path}: a Git LFS pointer, not the file. Run `git lfs pull`") from None
        where = f"{path}:{getattr(error, 'lineno', 1)}"
        raise UserError(f"{where}: broken JSON, {json_fault(error)}. {download_again(path)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}:1: expected a JSON object, found {type(value).__name__}. {download_again(path)}")
    return value


def fingerprint(checkpoint_dir: Path) -> str:
    """Name a base model by its config and its weight files' names, sizes and three samples of each.

    Revisions of one model differ in weights of the same size, which the samples tell apart without reading 13 GB.

    Args:
        checkpoint_dir: The model's directory.

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


def download_again(path: Path) -> str:
    """Return the remedy for a file that is missing or broken."""
    return f"Download {path.name} again"


def check_unquantised(checkpoint_dir: Path, config: dict) -> None:
    """Refuse --load_in_4bit for a model whose weights are int4 or int8 already.

    Args:
        checkpoint_dir: The model's directory, for the message.
        config: Its config.json.

    Raises:
        UserError: It is quantised.
    """
    if bits := config.get("quantization_bit"):
        raise UserError(f"{checkpoint_dir}: int{bits} already. Leave --load_in_4bit out, or give the fp16 checkpoint")
