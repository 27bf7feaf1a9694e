"""Read the JSON files of a model directory, and check config.json before a configuration object is made of it.

transformers assigns what a config.json says to a configuration object, whatever its type, and builds a model of it. A
wrong type then ends in the middle of a layer, and a wrong size in an allocation that no machine can make.
"""

import dataclasses
import typing
from pathlib import Path
from types import NoneType
from typing import NamedTuple

from loguru import logger
from transformers import GenerationConfig, PretrainedConfig

from glm_utils.cli import UserError
from glm_utils.model_files.model_json import shown

MAX_TOKENS = 2**31 - 1


class Range(NamedTuple):
    """Allowed numbers, both ends included."""

    low: float
    high: float


COUNT = Range(0, MAX_TOKENS)
SIZES = Range(1, 2**20)
POSITIONS = Range(1, MAX_TOKENS)
SHARE = Range(0, 1)
VOCABULARY = Range(1, 2**24)
# Of every number in both families' configurations. Products of sizes stay below 2**63, which torch can represent.
RANGES = {
    "vocab_size": VOCABULARY,
    "padded_vocab_size": VOCABULARY,
    "hidden_size": SIZES,
    "inner_hidden_size": SIZES,
    "ffn_hidden_size": SIZES,
    "num_layers": Range(1, 1000),
    "num_attention_heads": Range(1, 2**14),
    "multi_query_group_num": Range(1, 2**14),
    "kv_channels": Range(1, 2**14),
    "max_sequence_length": POSITIONS,
    "seq_length": POSITIONS,
    "layernorm_epsilon": SHARE,
    "attention_dropout": SHARE,
    "hidden_dropout": SHARE,
    "rope_ratio": Range(0, MAX_TOKENS),
    "initializer_range": SHARE,
    "quantization_bit": COUNT,  # the configuration itself names the supported ones
    "pre_seq_len": COUNT,
    "bos_token_id": COUNT,
    "eos_token_id": COUNT,
    "pad_token_id": COUNT,
    "mask_token_id": COUNT,
    "gmask_token_id": COUNT,
}
DTYPE_CHOICES = ("float16", "bfloat16", "float32")
DESCRIPTIVE: dict[str, typing.Any] = {  # kept beside the settings of the model
    "model_type": str,
    "architectures": list[str] | None,
    "torch_dtype": typing.Literal[DTYPE_CHOICES] | None,
    "dtype": typing.Literal[DTYPE_CHOICES] | None,
    "transformers_version": str | None,
}
NOT_COMPUTED = ("quantization_config", "rope_scaling", "per_layer_config")  # they would change what a model computes
# Written by transformers 4 into any config.json, without a meaning for these models
NO_MEANING = {"auto_map", "classifier_dropout", "tokenizer_class", "torchscript", "use_bfloat16", "tf_legacy_loss"}
NO_MEANING |= {"pruned_heads", "is_decoder", "add_cross_attention", "cross_attention_hidden_size", "prefix"}
NO_MEANING |= {"tie_encoder_decoder", "finetuning_task", "sep_token_id", "task_specific_params", "num_labels"}
NO_MEANING |= set(PretrainedConfig().to_dict()) | set(GenerationConfig().to_dict())


def value_fault(value: object, hint: typing.Any, allowed: Range | None = None) -> str | None:
    """Say what was expected of a value; None if it fits.

    Args:
        value: A value of a JSON file.
        hint: int, float, bool, str, None, dict, a Literal, list[...] of these, or a union.
        allowed: Range of its numbers.
    """
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, type(str | None)) else (hint,)
    if any(_fits(value, member, allowed) for member in members):
        return None
    return "expected " + " or ".join(_in_words(member, allowed) for member in members)


def _fits(value: object, member: typing.Any, allowed: Range | None) -> bool:
    """Return whether a value is of one type, and in range."""
    if typing.get_origin(member) is typing.Literal:
        return any(
            value is choice or (isinstance(value, str) and value == choice) for choice in typing.get_args(member)
        )
    if typing.get_origin(member) is list:
        return isinstance(value, list) and all(_fits(item, typing.get_args(member)[0], allowed) for item in value)
    if member in (int, float):
        is_number = type(value) is int or (member is float and type(value) is float)
        return is_number and (allowed is None or allowed.low <= typing.cast(float, value) <= allowed.high)
    return type(value) is member


def _in_words(member: typing.Any, allowed: Range | None) -> str:
    """Name a type for a message."""
    if typing.get_origin(member) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(member)))
    if typing.get_origin(member) is list:
        return f"a list, each {_in_words(typing.get_args(member)[0], allowed)}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}
    words |= {list: "a list"}
    limits = f" from {allowed.low:,} to {allowed.high:,}" if allowed and member in (int, float) else ""
    return words.get(member, "an object") + limits


def check_config(config: dict, config_class: type[PretrainedConfig], path: Path) -> dict:
    """Check every setting of a config.json that the model knows.

    Args:
        config: The parsed file.
        config_class: The family's configuration.
        path: The file, for messages.

    Returns:
        The settings that the model knows, and what describes the file. Others are left out: transformers would assign
        them to the configuration, where some names mean something to it. A warning names those that are not its own.

    Raises:
        UserError: A value of a wrong type or out of range, two names of one setting that disagree, or a setting that
            this project does not compute.
    """
    hints = settings_of(config_class)
    names = {name: name for name in hints} | config_class.attribute_map
    checked: dict = {}
    for key, value in config.items():
        name = names.get(key, key)
        hint = hints.get(name) or DESCRIPTIVE.get(name)
        if hint is None:
            continue
        if fault := value_fault(value, hint, RANGES.get(name)):
            raise UserError(f"{path}: {key} is {shown(value)}, {fault}")
        if checked.setdefault(name, value) != value:
            raise UserError(f"{path}: {key} is {shown(value)}, but {name} is {shown(checked[name])}: one setting")
    for key in NOT_COMPUTED:
        if config.get(key):
            raise UserError(f"{path}: {key} {shown(config[key])} is not supported. Give the published fp16 checkpoint")
    vocabulary = config_class.attribute_map.get("vocab_size", "vocab_size")
    ids = {key: value for key, value in checked.items() if key.endswith("_token_id")}
    check_token_ids(ids, checked.get(vocabulary, getattr(config_class, vocabulary)), path)
    ignored = [key for key in config if key not in {*names, *DESCRIPTIVE, *NO_MEANING, *NOT_COMPUTED}]
    if ignored := [shown(key) for key in ignored if not key.startswith("_")]:
        logger.warning(f"{path}: ignored, as the model has no such settings: {', '.join(ignored[:8])}")
    return checked


def settings_of(config_class: type[PretrainedConfig]) -> dict[str, typing.Any]:
    """Return the types of a configuration's own settings by name."""
    own = dataclasses.fields(config_class)
    return {field.name: field.type for field in own if field.name not in PretrainedConfig.__dataclass_fields__}


def check_token_ids(ids: dict[str, int | list[int] | None], vocab_size: int, path: Path) -> None:
    """Refuse a token id that the model's vocabulary does not have.

    Args:
        ids: One or several by the name of their setting.
        vocab_size: Rows of the embedding.
        path: The file, for messages.

    Raises:
        UserError: An id is too large.
    """
    for key, value in ids.items():
        if any(item is not None and item >= vocab_size for item in (value if isinstance(value, list) else [value])):
            raise UserError(f"{path}: {key} is {shown(value)}, expected ids below the vocabulary's size {vocab_size}")
