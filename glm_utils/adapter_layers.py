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
    settings, rank, alpha = adapter.config, adapter.config.values["r"], adapter.config.values["lora_alpha"]
    ranks = {path: settings.rank(path) for path in adapter.pairs if settings.rank(path) != rank}
    alphas = {path: settings.alpha(path) for path in adapter.pairs if settings.alpha(path) != alpha}
    peft_model = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            use_rslora=bool(settings.values.get("use_rslora")),
            rank_pattern=ranks,
            alpha_pattern=alphas,
            target_modules=list(adapter.pairs),
            task_type="CAUSAL_LM",
            inference_mode=True,
        ),
    )
    for path, pair in adapter.pairs.items():
        layer = peft_model.get_base_model().get_submodule(path)
        layer.lora_A["default"].weight.data.copy_(pair.a)
        layer.lora_B["default"].weight.data.copy_(pair.b)
    return peft_model.eval()
