"""Read a LoRA adapter, W' = W + scale * B @ A for each adapted weight, and open the base that it names.

Source: peft 0.21, LoraConfig and lora/layer.py (scale = alpha / r, rsLoRA alpha / sqrt(r), patterns by module name).
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from loguru import logger

from glm_utils.checkpoint import Checkpoint, open_checkpoint
from glm_utils.checkpoint_files import check_adapter_files
from glm_utils.cli import UserError
from glm_utils.run_record import read_run_config

LORA_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
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
)
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initializations that rewrite the base weights


@dataclass(frozen=True)
class LoraPair:
    """The update scale * b @ a of one weight [out, in].

    Attributes:
        a: fp32 [r, in].
        b: fp32 [out, r].
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight that is updated."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that can be merged.

    Attributes:
        directory: Directory that it was read from.
        base_name: Directory or hub id of the base that it was trained on.
        pairs: The updates by module path in the base model, e.g. "transformer.layers.0.attention.dense".
        run_config: What train_qlora.py recorded beside it; empty for adapters of other tools.
    """

    directory: Path
    base_name: str
    pairs: dict[str, LoraPair]
    run_config: dict = field(default_factory=dict)


def read_adapter(adapter_dir: Path) -> Adapter:
    """Read an adapter directory written by peft, including peft 0.4 (adapter_model.bin).

    Raises:
        UserError: Not an adapter, settings beyond plain LoRA, or weights that are incomplete or of the wrong shape.
    """
    config = check_adapter_files(adapter_dir)
    config_path = adapter_dir / "adapter_config.json"
    check_plain_lora(config, config_path)
    base_name = config.get("base_model_name_or_path")
    if not base_name:
        raise UserError(f"{config_path}: base_model_name_or_path is {base_name!r}. Write the base model's path there")
    if config.get("revision"):
        raise UserError(
            f"{config_path}: trained on revision {config['revision']!r} of {base_name}. Download that revision (hf "
            f"download {base_name} --revision {config['revision']} --local-dir DIR), then set "
            "base_model_name_or_path to DIR and revision to null"
        )
    return Adapter(adapter_dir, base_name, read_pairs(adapter_dir, config), read_run_config(adapter_dir))


def find_base(adapter: Adapter) -> Checkpoint:
    """Open the base model that an adapter names, and check that the adapter was trained on it.

    Raises:
        UserError: The base cannot be found, is broken or quantized, or is another revision.
    """
    try:
        base = open_checkpoint(adapter.base_name)
    except UserError as error:
        raise UserError(
            f"the base model of {adapter.directory} cannot be opened. {error}. If the base has moved, write its path "
            f"to base_model_name_or_path in {adapter.directory / 'adapter_config.json'}"
        ) from error
    base.require_unquantized(
        f"a LoRA update cannot be added to integer weights (base_model_name_or_path of {adapter.directory})"
    )
    trained_on = adapter.run_config.get("identity", {}).get("base_fingerprint")
    if trained_on and trained_on != base.fingerprint:
        raise UserError(
            f"{base.directory} is not the base that {adapter.directory} was trained on: its fingerprint is "
            f"{base.fingerprint}, run_config.json recorded {trained_on}. Restore that revision of the base, or train "
            "on this one"
        )
    if not trained_on:
        logger.warning(
            f"{adapter.directory} has no run_config.json: assuming that its base is {base.directory}, unchanged"
        )
    return base


def check_plain_lora(config: dict, config_path: Path) -> None:
    """Refuse settings whose update is not scale * B @ A.

    Args:
        config: Parsed adapter_config.json.
        config_path: Its path, for messages.

    Raises:
        UserError: The adapter has such settings.
    """
    found = [f"{key} {config[key]!r}" for key in UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") != "none":
        found.append(f"bias {config['bias']!r}")
    if found:
        raise UserError(f"{config_path}: {', '.join(found)} cannot be merged here. {MERGE_ELSEWHERE}")
    init = str(config.get("init_lora_weights", "")).lower()
    if init.startswith(CHANGES_THE_BASE):
        raise UserError(
            f"{config_path}: init_lora_weights {init!r} changed the base weights before training. Convert it to plain "
            "LoRA first (save_pretrained with path_initial_model_for_weight_conversion)"
        )


def read_pairs(adapter_dir: Path, config: dict) -> dict[str, LoraPair]:
    """Read the A and B matrices of every adapted module.

    Args:
        adapter_dir: A checked adapter directory.
        config: Its parsed adapter_config.json.

    Returns:
        The pairs by module path.

    Raises:
        UserError: A key that is not a LoRA matrix of a Linear, A without B, a rank other than the config's, or numbers
            that are not finite.
    """
    from peft.utils import load_peft_weights  # here, as a merged model is loaded without peft
    from peft.utils.other import get_pattern_key

    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_peft_weights(str(adapter_dir), device="cpu").items():
        match = LORA_KEY.fullmatch(key)
        if not match:
            raise UserError(f"{adapter_dir}: weight {key!r} is not a LoRA matrix of a Linear. {MERGE_ELSEWHERE}")
        sides.setdefault(match["path"], {})[match["side"]] = tensor.float()
    if not sides:
        raise UserError(f"{adapter_dir}: the adapter holds no weights. Was the training interrupted?")
    pairs = {}
    for path, matrices in sides.items():
        if set(matrices) != {"A", "B"}:
            raise UserError(f"{adapter_dir}: {path} has only lora_{next(iter(matrices))}. Is the file incomplete?")
        a, b = matrices["A"], matrices["B"]
        rank_pattern, alpha_pattern = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
        rank = rank_pattern.get(get_pattern_key(rank_pattern, path), config["r"])
        alpha = alpha_pattern.get(get_pattern_key(alpha_pattern, path), config["lora_alpha"])
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
            shapes = f"A {list(a.shape)}, B {list(b.shape)}"
            raise UserError(f"{adapter_dir}: {path} has {shapes}, but adapter_config.json says rank {rank}")
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise UserError(f"{adapter_dir}: {path} holds NaN or infinite numbers. The training diverged; train again")
        pairs[path] = LoraPair(a, b, alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)
    return pairs
