"""Adapters for attacks: small whole ones, and hypothesis strategies that damage them in every way a file can be.

Used by test_hostile_adapters.py and by the campaign.
"""

import json
import string
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from glm_utils.cli import UserError

CONFIG = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "bias": "none"}
REGEX_BOMB = "((([a-z_.0-9])+)+)+[A-Z]"


def write_adapter(directory: Path, base_dir: Path, shapes: Mapping[str, tuple[int, int]], rank: int = 2) -> Path:
    """Write a whole adapter of random weights, as peft does.

    Args:
        directory: Where to; it is created.
        base_dir: The base that it names.
        shapes: [out, in] of the adapted weights, by module path.
        rank: Of all updates.
    """
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for path, (rows, columns) in shapes.items():
        for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            tensors[f"base_model.model.{path}.lora_{side}.weight"] = torch.randn(shape, generator=generator) / 10
    save_file(tensors, directory / "adapter_model.safetensors")
    targets = sorted({path.rpartition(".")[2] for path in shapes})
    config = CONFIG | {"r": rank, "base_model_name_or_path": str(base_dir), "target_modules": targets}
    (directory / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    return directory


def refusal(action: Callable[[], object]) -> str | None:
    """Return the one line with which an action refuses, None if it works; any other exception passes."""
    try:
        action()
    except UserError as error:
        message = str(error)
        assert message
        assert "\n" not in message, message
        return message
    return None


# ---- what files can hold

TEXTS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        [
            "",
            REGEX_BOMB,
            ".*",
            "(a|b",
            "query_key_value",
            "all-linear",
            r".*\.dense",
            "\x1b[2J",
            "\u202e",
            "\ud800",
            "a\x00b",
            "~nobody-here/x",
            "../" * 50,
            "x" * 5000,
            "x/" * 3000,
            "/dev/stdin",
            "NaN",
        ]
    ),
)
NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([0, 1, 2, -1, 2**30, 2**31, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf"), -0.0]),
    st.floats(),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=12,
)
KEYS = st.sampled_from(
    [
        "peft_type r lora_alpha lora_dropout target_modules exclude_modules modules_to_save bias use_dora use_rslora",
        "fan_in_fan_out init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern task_type",
        "base_model_name_or_path revision auto_mapping inference_mode peft_version megatron_config megatron_core",
        "loftq_config eva_config corda_config lora_ga_config trainable_token_indices target_parameters lora_bias",
        "layer_replication use_qalora qalora_group_size use_bdlora arrow_config alora_invocation_tokens enable_lora",
    ]
).flatmap(lambda names: st.sampled_from(names.split()))
PATTERNS = st.dictionaries(st.one_of(TEXTS, st.sampled_from(["dense", "^x.y", "query_key_value"])), VALUES, max_size=4)
SETTINGS = st.one_of(VALUES, PATTERNS, st.lists(TEXTS, max_size=3))
CONFIG_CHANGES = st.dictionaries(KEYS, SETTINGS, min_size=1, max_size=3)
RECORD_KEYS = st.sampled_from(
    ["identity", "arguments", "training_args", "base", "data", "stage", "base_fingerprint", "compute_dtype", "use_cpu"]
    + ["max_input_length", "max_output_length", "prompt_text", "format_version"]
)
RECORDS = st.dictionaries(RECORD_KEYS, st.one_of(VALUES, st.dictionaries(RECORD_KEYS, VALUES, max_size=4)), max_size=4)


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Cut, flip, insert or repeat bytes of a file."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["cut", "flip", "insert", "repeat", "head"]))
        place = draw(st.integers(0, max(0, min(len(found), 4000) - 1)))
        if kind == "cut":
            del found[draw(st.integers(0, len(found))) :]
        elif kind == "head":
            found[:8] = draw(st.binary(min_size=8, max_size=8))
        elif kind == "insert":
            found[place:place] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "repeat":
            found += found[place:]
        elif found:
            found[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(found)


@st.composite
def lying_header(draw: st.DrawFn, data: bytes) -> bytes:
    """Change the JSON header of a safetensors file and keep its length right."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(header)))
        kind = draw(st.sampled_from(["entry", "part", "shape", "name", "drop"]))
        if kind == "drop":
            header.pop(name)
        elif kind == "name":
            header[draw(TEXTS)] = header.pop(name)
        elif kind == "shape" and isinstance(header[name], dict):
            header[name]["shape"] = draw(st.lists(st.sampled_from([0, 1, 2, 2**30, 2**62, -1]), max_size=4))
        elif kind == "part" and isinstance(header[name], dict):
            header[name][draw(st.sampled_from(["dtype", "shape", "data_offsets", "x"]))] = draw(VALUES)
        else:
            header[name] = draw(VALUES)
        if not header:
            break
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


MODULE_NAMES = st.one_of(TEXTS, st.text(string.ascii_lowercase + "._", max_size=30))
TENSORS = st.builds(
    lambda dtype, shape: torch.zeros(shape, dtype=dtype),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float64, torch.bool]),
    st.lists(st.sampled_from([0, 1, 2, 3, 64]), max_size=3),
)


@st.composite
def tensor_changes(draw: st.DrawFn, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return a valid safetensors file with other tensors: renamed, missing, added, of other shapes, types, values."""
    found = dict(tensors)
    for _ in range(draw(st.integers(1, 3))):
        if not found:
            break
        name = draw(st.sampled_from(sorted(found)))
        kind = draw(st.sampled_from(["drop", "rename", "replace", "nan", "add", "second"]))
        if kind == "drop":
            del found[name]
        elif kind == "rename":
            found[draw(MODULE_NAMES.filter(_is_encodable))] = found.pop(name)
        elif kind == "nan":
            found[name] = found[name] * draw(st.sampled_from([float("nan"), float("inf"), 1e30]))
        elif kind == "second":
            found[name.replace(".weight", ".default.weight")] = found[name]
        elif kind == "add":
            found[f"base_model.model.{draw(MODULE_NAMES.filter(_is_encodable))}.lora_A.weight"] = draw(TENSORS)
        else:
            found[name] = draw(TENSORS)
    return save({name: tensor.clone() for name, tensor in found.items()})


def _is_encodable(text: str) -> bool:
    return text.isprintable()
