"""adapter_config.json of a LoRA adapter: every key that peft or this project reads, checked before either acts on it.

Source: peft 0.21, LoraConfig; adapters of 2023 (peft 0.2 to 0.4) have some of its keys.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from loguru import logger

from glm_utils.cli import UserError
from glm_utils.files import read_json_object
from glm_utils.module_names import ModuleNames, PatternTable, endings_of, read_names
from glm_utils.visible_text import UNSAFE, shortened

MAX_FILE_BYTES = 10_000_000
MAX_RANK, MAX_ALPHA = 1 << 16, 1e6
MAX_PATH_BYTES, MAX_PART_BYTES = 4000, 255  # of a path and of a name in it
MERGE_ELSEWHERE = "Merge it with peft (PeftModel.merge_and_unload) and save the fp16 model"
UNSUPPORTED = (  # settings under which the update is not scale * B @ A on Linear weights alone
    "use_dora",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "megatron_config",
    "fan_in_fan_out",
    "enable_lora",
)
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initializations that rewrite the base weights


@dataclass(frozen=True)
class AdapterConfig:
    """The checked settings of a plain LoRA adapter, W' = W + scale * B @ A.

    Attributes:
        path: adapter_config.json.
        values: What the file holds, every known key of its type and range.
        targets: The adapted modules; None: the file does not say.
        excluded: Modules that are not adapted although `targets` names them.
        ranks: Ranks by module, where they differ from r.
        alphas: Alphas by module, where they differ from lora_alpha.
    """

    path: Path = Path()
    values: dict = field(default_factory=dict)
    targets: ModuleNames | None = None
    excluded: ModuleNames | None = None
    ranks: PatternTable = field(default_factory=PatternTable)
    alphas: PatternTable = field(default_factory=PatternTable)

    def rank(self, module: str) -> int:
        """Return the rank of a module's update."""
        return int(self.ranks.get(module, self.values["r"]))

    def alpha(self, module: str) -> float:
        """Return alpha of a module's update."""
        return self.alphas.get(module, self.values["lora_alpha"])

    def scale(self, module: str) -> float:
        """Return what B @ A is multiplied by: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        rank = self.rank(module)
        return self.alpha(module) / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    def is_adapted(self, module: str) -> bool:
        """Return whether the settings name a module; True if they name none at all."""
        if self.excluded is not None and module in self.excluded:
            return False
        return self.targets is None or (module in self.targets and self._is_in_layers(module))

    def _is_in_layers(self, module: str) -> bool:
        """Return whether a module lies in layers_to_transform; peft applies it to lists of names only."""
        layers, patterns = self.values.get("layers_to_transform"), self.values.get("layers_pattern") or []
        if layers in (None, []) or isinstance(self.values.get("target_modules"), str):
            return True
        parts = module.split(".")
        heads = {patterns} if isinstance(patterns, str) else set(patterns)
        for number, part in enumerate(parts[1:-1], start=1):
            above = ".".join(parts[:number])
            if part.isdecimal() and (not heads or heads & set(endings_of(above))) and (heads or number > 1):
                return int(part) in ([layers] if isinstance(layers, int) else layers)
        return False


def read_adapter_config(adapter_dir: Path) -> AdapterConfig:
    """Read adapter_config.json.

    Raises:
        UserError: Not an adapter, not LoRA, or a value of another type or out of range.
    """
    path = adapter_dir / "adapter_config.json"
    if path.stat().st_size > MAX_FILE_BYTES:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes, expected a few thousand. Copy the adapter again")
    values = read_json_object(path)
    if values.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {shortened(values.get('peft_type'))}, expected 'LORA'")
    for key in ("r", "lora_alpha"):
        if key not in values:
            raise UserError(f"{path}: {key} is missing. Copy the adapter again")
    for key, value in values.items():
        expected, fits = KEYS.get(key, ("", None))
        if fits and not fits(value):
            raise UserError(f"{path}: {key} is {shortened(value)}, expected {expected}. Copy the adapter again")
        if not fits and value:
            logger.warning(f"{path}: {shortened(key)} is not a setting that this project knows: ignored")
    return AdapterConfig(
        path=path,
        values=values,
        targets=read_names(values.get("target_modules"), "target_modules", path),
        excluded=read_names(values.get("exclude_modules"), "exclude_modules", path),
        ranks=PatternTable(values.get("rank_pattern") or {}, "rank_pattern", path),
        alphas=PatternTable(values.get("alpha_pattern") or {}, "alpha_pattern", path),
    )


def check_plain_lora(config: AdapterConfig) -> None:
    """Refuse settings whose update is not scale * B @ A.

    Raises:
        UserError: The adapter has such settings.
    """
    values = config.values
    found = [f"{key} {shortened(values[key])}" for key in UNSUPPORTED if values.get(key)]
    if values.get("bias", "none") != "none":
        found.append(f"bias {values['bias']!r}")
    if found:
        raise UserError(f"{config.path}: {', '.join(found)} cannot be merged here. {MERGE_ELSEWHERE}")
    init = str(values.get("init_lora_weights", "")).lower()
    if init.startswith(CHANGES_THE_BASE):
        raise UserError(
            f"{config.path}: init_lora_weights {shortened(init)} changed the base weights before training. Convert it "
            "to plain LoRA first (save_pretrained with path_initial_model_for_weight_conversion)"
        )


def base_name(config: AdapterConfig) -> str:
    """Return the directory or hub id of the base that an adapter names.

    Raises:
        UserError: None, what cannot be a path, or a revision that has to be downloaded first.
    """
    name, revision = config.values.get("base_model_name_or_path"), config.values.get("revision")
    if not name or not is_path(name):
        raise UserError(
            f"{config.path}: base_model_name_or_path is {shortened(name)}. Write the base model's path there"
        )
    if revision:
        raise UserError(
            f"{config.path}: trained on revision {shortened(revision)} of {name}. Download that revision (hf download "
            f"{name} --revision {revision} --local-dir DIR), then set base_model_name_or_path to DIR and revision to "
            "null"
        )
    return name


def is_path(text: str) -> bool:
    """Return whether a text can be a path or a hub id on this system."""
    if UNSAFE.search(text) or "\n" in text or len(text.encode()) > MAX_PATH_BYTES:
        return False
    if any(len(part.encode()) > MAX_PART_BYTES for part in text.split("/")):
        return False
    return not os.path.expanduser(text).startswith("~")  # the home of a user that does not exist


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
