"""Check the files of a checkpoint before a model is built: LFS pointers, truncation, missing shards, wrong directory.

No weight is read: headers, sizes and indexes are enough to refuse a broken 13 GB download within a second.
"""

import hashlib
import re
import zipfile
from pathlib import Path

from glm_utils.cli import UserError
from glm_utils.family import Family
from glm_utils.files import LFS_MAGIC, download_again
from glm_utils.model_files.adapter_config import AdapterConfig, read_adapter_config
from glm_utils.model_files.links import check_inside, check_links
from glm_utils.model_files.model_json import read_model_json, shown
from glm_utils.model_files.tensor_files import TensorSpec, is_legacy_bin, list_tensors, read_header

WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")  # each alone, or sharded with <name>.index.json
ADAPTER_WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
SAMPLE_BYTES = 1 << 16


def check_checkpoint_files(checkpoint_dir: Path, config: dict, family: Family) -> None:
    """Check that a directory holds a complete model: weights and vocabulary.

    Args:
        checkpoint_dir: The directory.
        config: Its parsed config.json.
        family: The model's family.

    Raises:
        UserError: A P-tuning checkpoint, an adapter in the same directory, links that lead out of it, or a file that
            is missing, a Git LFS pointer, truncated or damaged.
    """
    check_links(checkpoint_dir)
    if (checkpoint_dir / "adapter_config.json").exists():  # transformers would put it on the model without a word
        raise UserError(f"{checkpoint_dir}: a model and a LoRA adapter in one place. Move adapter_* to another one")
    if config.get("pre_seq_len"):
        raise UserError(
            f"{checkpoint_dir / 'config.json'}: pre_seq_len {shown(config['pre_seq_len'])} marks a P-tuning "
            f"checkpoint, and prefix tuning is not part of this project. Give the base model it was tuned from, e.g. "
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
            return [checkpoint_dir / shard for shard in read_index(index_path)]
    names = " or ".join([*WEIGHT_NAMES, *(f"{name}.index.json" for name in WEIGHT_NAMES)])
    raise UserError(f"{checkpoint_dir}: no weights. Expected {names}; download the checkpoint completely")


def stored_tensors(checkpoint_dir: Path) -> dict[str, TensorSpec]:
    """Return the dtype and shape of each tensor of a base model, from the headers of its files.

    Raises:
        UserError: A file is damaged, or two files hold a tensor of one name.
    """
    specs: dict[str, TensorSpec] = {}
    for path in weight_files(checkpoint_dir):
        found = list_tensors(path)
        if twice := sorted(specs.keys() & found.keys()):
            raise UserError(f"{path}: {shown(twice[0])} is in another file of {checkpoint_dir} too")
        specs |= found
    return specs


def read_index(index_path: Path) -> list[str]:
    """Return the names of the shards that an index lists.

    Raises:
        UserError: It is broken, or names something other than files beside it.
    """
    index = read_model_json(index_path, byte_order_mark=False)
    weight_map, suffix = index.get("weight_map"), index_path.name.split(".")[1]
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index_path}: weight_map is missing or empty. {download_again(index_path)}")
    if not isinstance(index.get("metadata"), dict):
        raise UserError(f"{index_path}: metadata is missing or not an object. {download_again(index_path)}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(rf"\w[\w.-]*\.{suffix}", shard):
            expected = f"expected the name of a .{suffix} file in this directory"
            raise UserError(f"{index_path}: {shown(name)} is in {shown(shard)}, {expected}")
    return sorted(set(weight_map.values()))


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
        UserError: It is missing, a pointer, empty, truncated or, if it is a .safetensors file, damaged.
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
        read_header(path)
    elif path.suffix == ".bin" and not is_legacy_bin(path) and not zipfile.is_zipfile(path):
        raise UserError(f"{path}: truncated ({path.stat().st_size} bytes, no end of archive). {download_again(path)}")


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
