"""Put a checked LoRA adapter on a model through peft, which reads none of the adapter's files."""

import peft
import torch
from transformers import PreTrainedModel

from glm_utils.adapter import Adapter


def put_on(model: PreTrainedModel, adapter: Adapter) -> peft.PeftModel:
    """Put a LoRA adapter on a base model, for generation.

    peft gets whole paths of modules and the ranks that the weights have, and reads none of the adapter's files: it
    would run the regular expressions in them, and allocate whatever rank they name.

    Args:
        model: The base model.
        adapter: The adapter, with its settings.

    Raises:
        UserError: The adapter does not fit the model.
    """
    output_layer = model.get_output_embeddings()  # adapted only by an adapter that says so
    shapes = {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and (module is not output_layer or path in adapter.pairs)
    }
    adapter.check_fit(shapes, model.name_or_path or type(model).__name__)
    config = peft.LoraConfig(
        **lora_scales(adapter), target_modules=list(adapter.pairs), task_type="CAUSAL_LM", inference_mode=True
    )
    peft_model = peft.get_peft_model(model, config)
    copy_weights(adapter, peft_model)
    return peft_model.eval()


def lora_scales(adapter: Adapter) -> dict:
    """Return the arguments of peft's LoraConfig for the ranks and scales of an adapter, exceptions by whole path."""
    settings, rank, alpha = adapter.config, adapter.config.values["r"], adapter.config.values["lora_alpha"]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": bool(settings.values.get("use_rslora")),
        "rank_pattern": {path: settings.rank(path) for path in adapter.pairs if settings.rank(path) != rank},
        "alpha_pattern": {path: settings.alpha(path) for path in adapter.pairs if settings.alpha(path) != alpha},
    }


def copy_weights(adapter: Adapter, peft_model: peft.PeftModel) -> None:
    """Copy the matrices of an adapter into the LoRA layers of a model, which have its ranks."""
    for path, pair in adapter.pairs.items():
        layer = peft_model.get_base_model().get_submodule(path)
        layer.lora_A["default"].weight.data.copy_(pair.a)
        layer.lora_B["default"].weight.data.copy_(pair.b)
