"""The two model families: everything that differs between them outside remote_scripts, as frozen records.

Source: the published config.json files. Both have model_type "chatglm", so other keys tell the families apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glm_utils.cli import UserError, nearest

PROJECT_DIR = Path(__file__).resolve().parent.parent
LINEAR_NAMES = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: Short name, also the directory in remote_scripts.
        title: Name in messages and documentation.
        config_markers: Keys of config.json that only this family has.
        hub_ids: Published repositories on Hugging Face; the first one is the default.
        modelscope_ids: The same on ModelScope.
        tokenizer_file: Published name of the sentencepiece file.
        max_length_key: Key of config.json that holds the context length, in tokens.
        train_args_json: TrainingArguments file that ships for this family.
        padding_side: Side on which a training batch is padded. Right padding is exact for both families, as
            everything after the prompt is causal; generation pads left.
        linear_names: All Linear modules of a layer, the valid LoRA targets.
        native_class: Class in transformers that computes the same model; None if there is none.
        gguf_architecture: Name of the architecture in llama.cpp; None if it has none.
    """

    name: str
    title: str
    config_markers: tuple[str, ...]
    hub_ids: tuple[str, ...]
    modelscope_ids: tuple[str, ...]
    tokenizer_file: str
    max_length_key: str
    train_args_json: str
    padding_side: str = "right"
    linear_names: tuple[str, ...] = LINEAR_NAMES
    native_class: str | None = None
    gguf_architecture: str | None = None

    @property
    def remote_dir(self) -> Path:
        """Directory of this family's configuration, modeling and tokenization files."""
        return PROJECT_DIR / "remote_scripts" / self.name


FAMILIES = (
    Family(
        name="chatglm-6b",
        title="ChatGLM-6B",
        config_markers=("inner_hidden_size", "position_encoding_2d"),
        hub_ids=("THUDM/chatglm-6b", "zai-org/chatglm-6b"),
        modelscope_ids=("ZhipuAI/chatglm-6b",),
        tokenizer_file="ice_text.model",
        max_length_key="max_sequence_length",
        train_args_json="chatGLM_6B_QLoRA.json",
    ),
    Family(
        name="chatglm2-6b",
        title="ChatGLM2-6B",
        config_markers=("ffn_hidden_size", "multi_query_group_num"),
        hub_ids=("THUDM/chatglm2-6b", "zai-org/chatglm2-6b"),
        modelscope_ids=("ZhipuAI/chatglm2-6b",),
        tokenizer_file="tokenizer.model",
        max_length_key="seq_length",
        train_args_json="chatGLM2_6B_QLoRA.json",
        native_class="GlmForCausalLM",
        gguf_architecture="chatglm",
    ),
)


def detect_family(config: dict, where: str | Path) -> Family:
    """Find the family of a checkpoint by its config.

    Args:
        config: Parsed config.json.
        where: Path of the config, named in the error.

    Raises:
        UserError: The config does not belong to a known family.
    """
    for family in FAMILIES:
        if config.get("model_type") == "chatglm" and all(marker in config for marker in family.config_markers):
            return family
    known = "; ".join(f"{family.title} (has {' and '.join(family.config_markers)})" for family in FAMILIES)
    found = f"model_type {config.get('model_type')!r}, architectures {config.get('architectures')!r}"
    raise UserError(
        f"{where}: unknown model family ({found}). Known families, all with model_type 'chatglm': {known}. "
        f"Give one of {', '.join(hub_id for family in FAMILIES for hub_id in family.hub_ids)} or a copy of it."
    )


def resolve_lora_targets(family: Family, lora_targets: str | Sequence[str]) -> list[str]:
    """Turn the --lora_targets flag into module names of a family.

    Args:
        family: The base model's family.
        lora_targets: One name, names joined by commas, a list, or "all-linear".

    Raises:
        UserError: No name, or one that no layer of this family has.
    """
    names = lora_targets.split(",") if isinstance(lora_targets, str) else list(lora_targets)
    names = [str(name).strip() for name in names if str(name).strip()]
    if names == ["all-linear"]:
        return list(family.linear_names)
    if not names:
        raise UserError(f"--lora_targets is empty. {nearest('', family.linear_names, 'targets')}, or all-linear")
    for name in names:
        if name not in family.linear_names:
            hint = nearest(name, [*family.linear_names, "all-linear"], "targets")
            raise UserError(f"--lora_targets: {family.title} has no module {name!r} to adapt. {hint}")
    return sorted(set(names), key=family.linear_names.index)
