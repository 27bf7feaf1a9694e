"""Find and load base models, tokenizers and adapters, always with the classes of remote_scripts.

Code that lies beside a checkpoint or on the hub is never executed: only config, tokenizer and weight files are read,
and the classes come from this project through transformers' own loader. Checks of the files are in checkpoint_files.
"""

import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import bitsandbytes
import peft
import torch
from huggingface_hub import HfApi, snapshot_download
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from glm_utils.checkpoint_files import check_adapter, check_checkpoint
from glm_utils.cli import UserError
from glm_utils.family import FAMILIES, PROJECT_DIR, Family, detect_family

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_PATTERNS = ["*.json", "*.model", "*.safetensors", "pytorch_model*.bin"]  # never *.py
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MODEL_CLASS = "modeling_chatglm.ChatGLMForConditionalGeneration"
TOKENIZER_CLASS = "tokenization_chatglm.ChatGLMTokenizer"


class Classes(NamedTuple):
    """The three classes of a family, from remote_scripts."""

    config: type
    model: type
    tokenizer: type


def project_path(path: str | Path) -> Path:
    """Return a path as given or, if there is nothing, relative to the project's directory (shipped files)."""
    path = Path(path).expanduser()
    return path if path.exists() or not (PROJECT_DIR / path).exists() else PROJECT_DIR / path


def resolve_checkpoint_dir(name_or_path: str) -> Path:
    """Find a base model: a local directory, or a hub id whose config, tokenizer and weights are downloaded.

    Args:
        name_or_path: Directory, or hub id such as THUDM/chatglm2-6b.

    Raises:
        UserError: Neither a directory nor a hub id that can be reached.
    """
    path = project_path(name_or_path)
    if path.is_dir():
        return path.resolve()
    is_hub_id = HUB_ID.fullmatch(name_or_path) and not path.exists() and not path.parent.is_dir()
    if not is_hub_id and name_or_path not in [hub_id for family in FAMILIES for hub_id in family.hub_ids]:
        known = ", ".join(hub_id for family in FAMILIES for hub_id in family.hub_ids)
        raise UserError(f"{name_or_path}: no such directory, and no hub id either. Known hub ids: {known}")
    try:
        return _download(name_or_path)
    except Exception as error:  # without a network: an error of whatever HTTP library huggingface_hub uses
        raise UserError(
            f"{name_or_path}: could not be downloaded ({type(error).__name__}: {str(error).partition(chr(10))[0]}). "
            f"Without a network, copy the checkpoint here and give its directory; where there is one: "
            f"hf download {name_or_path} --local-dir DIR"
        ) from error


def _download(hub_id: str) -> Path:
    """Download config, tokenizer and weights; safetensors alone where a repository holds both forms."""
    try:
        names = HfApi().list_repo_files(hub_id)
    except Exception:
        names = []  # no network, see above: snapshot_download finds what was downloaded before, or says so
    both = any(name.endswith(".safetensors") for name in names)
    return Path(snapshot_download(hub_id, allow_patterns=HUB_PATTERNS, ignore_patterns=["*.bin"] if both else None))


def load_classes(family: Family) -> Classes:
    """Load a family's classes through transformers' loader for remote code.

    The config class is the model class' own: fetched by itself it would be another object, and a directory saved with
    that one does not reload.

    Args:
        family: The family.
    """
    model = get_class_from_dynamic_module(MODEL_CLASS, str(family.remote_dir))
    return Classes(model.config_class, model, load_tokenizer_class(family))


def load_tokenizer_class(family: Family) -> type:
    """Load a family's tokenizer class alone, which is faster than `load_classes`."""
    return get_class_from_dynamic_module(TOKENIZER_CLASS, str(family.remote_dir))


def load_tokenizer(checkpoint_dir: Path) -> PreTrainedTokenizer:
    """Load the tokenizer of a base model.

    Args:
        checkpoint_dir: A checked checkpoint directory.

    Raises:
        UserError: A vocabulary that cannot be read.
    """
    family = detect_family(check_checkpoint(checkpoint_dir), checkpoint_dir / "config.json")
    try:
        return load_tokenizer_class(family).from_pretrained(checkpoint_dir)
    except ValueError as error:
        raise UserError(f"{checkpoint_dir / family.tokenizer_file}: {error}") from error


def load_config(checkpoint_dir: Path) -> PretrainedConfig:
    """Read and check the configuration of a base model.

    Args:
        checkpoint_dir: The model's directory.

    Raises:
        UserError: Files that are missing or broken, or a setting that this project's model does not compute.
    """
    config, config_path = check_checkpoint(checkpoint_dir), checkpoint_dir / "config.json"
    try:
        return load_classes(detect_family(config, config_path)).config.from_dict(config)
    except ValueError as error:
        raise UserError(f"{config_path}: {error}") from error


def load_base_model(
    checkpoint_dir: Path,
    load_in_4bit: bool = False,
    compute_dtype: str | torch.dtype = "fp32",
    device_map: str | dict | None = None,
    dtype: str | torch.dtype | None = None,
) -> PreTrainedModel:
    """Load a base model with this project's classes.

    Args:
        checkpoint_dir: The model's directory.
        load_in_4bit: Quantise the layers to NF4 with double quantisation (bitsandbytes) while loading.
        compute_dtype: fp32, fp16, bf16 or a torch dtype: dtype of the products with 4-bit weights.
        device_map: As in transformers.
        dtype: Dtype of the weights that are not quantised; None: compute_dtype.

    Raises:
        UserError: Files that are missing, broken or no base model of a known family, or weights that are not exactly
            those of the configuration.
    """
    family = detect_family(check_checkpoint(checkpoint_dir), checkpoint_dir / "config.json")
    compute_dtype = DTYPES.get(compute_dtype, compute_dtype)
    dtype = DTYPES.get(dtype, dtype) or compute_dtype
    quantization_config = None
    if load_in_4bit:
        quantization_config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    model, loading_info = load_classes(family).model.from_pretrained(
        checkpoint_dir,
        config=load_config(checkpoint_dir),
        dtype=dtype,
        device_map=device_map,
        quantization_config=quantization_config,
        ignore_mismatched_sizes=True,  # reported below, with a remedy
        output_loading_info=True,
    )
    check_loaded_weights(checkpoint_dir, model, loading_info)
    keep_4bit_layout(model)
    return model


def check_loaded_weights(checkpoint_dir: Path, model: PreTrainedModel, loading_info: dict) -> None:
    """Refuse a model whose weights are not exactly those of its configuration: transformers only warns.

    Args:
        checkpoint_dir: The model's directory, for the message.
        model: The loaded model. Transformers takes 4-bit weights of any shape without a word, so they are compared.
        loading_info: What `from_pretrained(output_loading_info=True)` returns.

    Raises:
        UserError: Weights that are missing, left over or of another shape.
    """
    kinds = ("missing", "mismatched", "unexpected")
    found = {kind: [str(key) for key in loading_info[f"{kind}_keys"]] for kind in kinds}
    found["mismatched"] += [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
        and (state := getattr(module.weight, "quant_state", None)) is not None
        and tuple(state.shape) != (module.out_features, module.in_features)
    ]
    check_weights(checkpoint_dir, **found)


def check_weights(checkpoint_dir: Path, **faults: Iterable[str]) -> None:
    """Refuse weights that are not exactly those of a configuration.

    Args:
        checkpoint_dir: The model's directory, for the message.
        **faults: Names of weights by what is wrong with them: missing, mismatched (a shape may follow the name),
            unexpected. Rope frequencies may be stored or not: the models compute them.

    Raises:
        UserError: There are such weights.
    """
    for kind, names in faults.items():
        counted = sorted(name for name in names if not name.split(" ")[0].endswith("inv_freq"))
        if counted:
            raise UserError(
                f"{checkpoint_dir}: {len(counted)} {kind} weights, e.g. {counted[0]}. The weights must be those of "
                "config.json; download both again, from the same revision"
            )


def keep_4bit_layout(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on the CPU.

    On a CPU with avx512_bf16 its `Linear4bit` repacks its weights in place in the first evaluation forward. Training
    goes on through a product without gradient: the LoRA gradients of earlier layers are exactly 0, and dequantising
    returns garbage. Source: bitsandbytes 0.50.2, nn/modules.py, `Linear4bit.forward`.

    Args:
        model: Any model; changed in place.
    """
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def load_adapter(model: PreTrainedModel, adapter_dir: Path, is_trainable: bool = False) -> peft.PeftModel:
    """Put a LoRA adapter on a base model, also one written by peft 0.4 (adapter_model.bin, read with weights_only).

    Args:
        model: The base model.
        adapter_dir: Directory of the adapter.
        is_trainable: Whether the LoRA weights get gradients.

    Raises:
        UserError: No adapter, or one whose weights do not fit the model.
    """
    check_adapter(adapter_dir)
    try:
        peft_model = peft.PeftModel.from_pretrained(model, str(adapter_dir), is_trainable=is_trainable)
    except pickle.UnpicklingError as error:
        raise UserError(f"{adapter_dir}/adapter_model.bin holds more than tensors and is not read: {error}") from error
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{adapter_dir}: the adapter does not fit this base model: {error}") from error
    keep_4bit_layout(peft_model)
    loaded = set(peft.utils.load_peft_weights(str(adapter_dir), device="cpu"))
    expected = set(peft.get_peft_model_state_dict(peft_model))
    if loaded != expected:
        missing, unexpected = sorted(expected - loaded)[:3], sorted(loaded - expected)[:3]
        raise UserError(f"{adapter_dir}: does not fit this base model; missing {missing}, unexpected {unexpected}")
    return peft_model
