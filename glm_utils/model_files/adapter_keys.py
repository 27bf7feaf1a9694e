"""The keys of adapter_config.json that peft or this project reads: what each may hold, in words and as a check.

Source: peft 0.21, LoraConfig; adapters of 2023 (peft 0.2 to 0.4) have some of these keys.
"""

from collections.abc import Callable

MAX_RANK, MAX_ALPHA = 1 << 16, 1e6


def _is(*kinds: type) -> Callable[[object], bool]:
    """Return a check for None or a value of some kinds; true and false are no numbers."""
    return lambda value: value is None or (isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)))


def _is_number(value: object, low: float, high: float) -> bool:
    """Return whether a value is a number in a range; NaN is in none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and _is_number(value, 1, MAX_RANK)


def _is_alpha(value: object) -> bool:
    return _is_number(value, 1e-6, MAX_ALPHA)


def _is_list_of(*kinds: type) -> Callable[[object], bool]:
    """Return a check for None or a list of values of some kinds."""
    return lambda value: value is None or (isinstance(value, list) and all(_is(*kinds)(item) for item in value))


def _is_text_or_list(value: object) -> bool:
    return isinstance(value, str) or _is_list_of(str)(value)


def _is_table_of(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    """Return a check for None or an object whose values fit."""
    return lambda value: value is None or (isinstance(value, dict) and all(map(fits, value.values())))


_TEXT = ("text", _is(str))
_SWITCH = ("true or false", _is(bool))
_OBJECT = ("an object or null", _is(dict))
_NAMES = ("a list of texts", _is_list_of(str))
_TEXT_OR_NAMES = ("text or a list of texts", _is_text_or_list)
_RANK_WORDS, _ALPHA_WORDS = f"a whole number from 1 to {MAX_RANK}", f"a number above 0, at most {MAX_ALPHA:g}"
KEYS: dict[str, tuple[str, Callable[[object], bool]]] = {  # what is expected, in words and as a check
    **dict.fromkeys(("peft_type", "task_type", "peft_version", "revision", "megatron_core"), _TEXT),
    "base_model_name_or_path": _TEXT,
    **dict.fromkeys(("use_dora", "use_rslora", "use_qalora", "lora_bias", "fan_in_fan_out"), _SWITCH),
    **dict.fromkeys(("inference_mode", "ensure_weight_tying", "merge_weights"), _SWITCH),
    **dict.fromkeys(("auto_mapping", "megatron_config", "loftq_config", "eva_config", "corda_config"), _OBJECT),
    **dict.fromkeys(("lora_ga_config", "velora_config", "monteclora_config", "arrow_config", "kasa_config"), _OBJECT),
    **dict.fromkeys(("runtime_config", "use_bdlora"), _OBJECT),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), _TEXT_OR_NAMES),
    **dict.fromkeys(("modules_to_save", "target_parameters"), _NAMES),
    "r": (_RANK_WORDS, _is_rank),
    "lora_alpha": (_ALPHA_WORDS, _is_alpha),
    "rank_pattern": (f"an object whose values are each {_RANK_WORDS}", _is_table_of(_is_rank)),
    "alpha_pattern": (f"an object whose values are each {_ALPHA_WORDS}", _is_table_of(_is_alpha)),
    "lora_dropout": ("a number from 0 to below 1", lambda value: value is None or _is_number(value, 0, 1 - 1e-9)),
    "bias": ("none, all or lora_only", lambda value: value in ("none", "all", "lora_only")),
    "init_lora_weights": ("true, false or text", _is(bool, str)),
    "layers_to_transform": (
        "a number or a list of numbers",
        lambda value: _is(int)(value) or _is_list_of(int)(value),
    ),
    "qalora_group_size": ("a number", _is(int)),
    "alora_invocation_tokens": ("a list of numbers", _is_list_of(int)),
    "enable_lora": ("a list of true and false", _is_list_of(bool)),
    "layer_replication": ("a list of pairs", _is_list_of(list)),
    "trainable_token_indices": (
        "a list of numbers, or an object of such lists",
        lambda value: _is_list_of(int)(value) or _is_table_of(_is_list_of(int))(value),
    ),
}
