"""adapter_config.json of a LoRA adapter: every key that peft or this project reads, checked before either acts on it.

Needs no torch, so that a wrong adapter is refused at once. Source: peft 0.21, LoraConfig and lora/layer.py.
"""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from loguru import logger

from glm_utils.cli import UserError
from glm_utils.model_files.adapter_keys import KEYS
from glm_utils.model_files.directory_kind import USE_FLAGS, PathFlags, advice, directory_kind
from glm_utils.model_files.links import check_inside
from glm_utils.model_files.model_json import read_model_json, shown
from glm_utils.model_files.module_names import ModuleNames, PatternTable, endings_of, read_names
from glm_utils.visible_text import UNSAFE

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


def read_adapter_config(adapter_dir: Path, flags: PathFlags = USE_FLAGS) -> AdapterConfig:
    """Read adapter_config.json.

    Args:
        adapter_dir: Directory of the adapter.
        flags: Those of the command, for messages.

    Raises:
        UserError: Not an adapter, not LoRA, a link out of the directory, or a value of another type or out of range.
    """
    path = adapter_dir / "adapter_config.json"
    if not adapter_dir.is_dir():
        raise UserError(f"{adapter_dir}: no such directory. {advice(adapter_dir, flags)}")
    if not path.is_file():
        raise UserError(f"{path} is missing: not a LoRA adapter. {advice(adapter_dir, flags)}")
    if directory_kind(adapter_dir) == "glm adapter":
        raise UserError(f"{adapter_dir}: not an adapter for this project's models. {advice(adapter_dir, flags)}")
    check_inside(path)
    values = read_model_json(path)
    if values.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {shown(values.get('peft_type'))}, expected 'LORA'")
    for key in ("r", "lora_alpha"):
        if key not in values:
            raise UserError(f"{path}: {key} is missing. Copy the adapter again")
    for key, (expected, fits) in KEYS.items():
        if key in values and not fits(values[key]):
            raise UserError(f"{path}: {key} is {shown(values[key])}, expected {expected}. Copy the adapter again")
    return AdapterConfig(
        path=path,
        values=values,
        targets=read_names(values.get("target_modules"), "target_modules", path),
        excluded=read_names(values.get("exclude_modules"), "exclude_modules", path),
        ranks=PatternTable(values.get("rank_pattern") or {}, "rank_pattern", path),
        alphas=PatternTable(values.get("alpha_pattern") or {}, "alpha_pattern", path),
    )


def check_plain_lora(config: AdapterConfig) -> None:
    """Refuse settings whose update is not scale * B @ A, and name those that are not known.

    Raises:
        UserError: The adapter has such settings.
    """
    values = config.values
    if unknown := [shown(key) for key, value in values.items() if key not in KEYS and value]:
        logger.warning(f"{config.path}: {', '.join(unknown[:5])} are not settings that this project knows: ignored")
    found = [f"{key} {shown(values[key])}" for key in UNSUPPORTED if values.get(key)]
    if values.get("bias", "none") != "none":
        found.append(f"bias {values['bias']!r}")
    if found:
        raise UserError(f"{config.path}: {', '.join(found)} cannot be merged here. {MERGE_ELSEWHERE}")
    init = str(values.get("init_lora_weights", "")).lower()
    if init.startswith(CHANGES_THE_BASE):
        raise UserError(
            f"{config.path}: init_lora_weights {shown(init)} changed the base weights before training. Convert it "
            "to plain LoRA first (save_pretrained with path_initial_model_for_weight_conversion)"
        )


def base_name(config: AdapterConfig) -> str:
    """Return the directory or hub id of the base that an adapter names.

    Raises:
        UserError: None, what cannot be a path, or a revision that has to be downloaded first.
    """
    name, revision = config.values.get("base_model_name_or_path"), config.values.get("revision")
    if not name or not is_path(name):
        raise UserError(f"{config.path}: base_model_name_or_path is {shown(name)}. Write the base model's path there")
    if revision:
        raise UserError(
            f"{config.path}: trained on revision {shown(revision)} of {name}. Download that revision (hf download "
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
