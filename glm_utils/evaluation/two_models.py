"""The two models of an evaluation: opened, and given the same text before every question."""

from dataclasses import dataclass, replace

import torch

from glm_utils.cli import as_list
from glm_utils.early_checks import check_number_of_models
from glm_utils.hub import Hub
from glm_utils.inference.request import auto_dtype, short_name
from glm_utils.load_model import ModelSource, find_model
from glm_utils.prompt_text import agree_on


@dataclass(frozen=True)
class Side:
    """One of the two models that are compared.

    Attributes:
        label: Its name in the report.
        source: What is loaded.
        use_adapter: Whether the source's adapter is on.
    """

    label: str
    source: ModelSource
    use_adapter: bool


def find_sides(
    model_path: str | list[str] | None,
    lora_path: str | None,
    load_in_4bit: bool,
    device: torch.device,
    hub: Hub = "huggingface",
) -> tuple[Side, Side]:
    """Open an adapter with its base, two models, or an adapter on its base and the model it was merged to.

    Args:
        model_path: Two directories or hub ids of base or merged models; with an adapter, one or none.
        lora_path: Directory of an adapter.
        load_in_4bit: Quantize the layers to NF4 while loading.
        device: Where they run.
        hub: Where to download a model from that is no directory.

    Raises:
        UserError: A number of models other than two in all, or one cannot be opened.
    """
    paths = as_list(model_path)
    check_number_of_models(paths, lora_path)

    def open_source(path: str | None, adapter_dir: str | None, in_4bit: bool) -> ModelSource:
        checkpoint, adapter = find_model(path, adapter_dir, hub)
        dtype = auto_dtype(checkpoint.config, checkpoint.config_path, device)
        label = short_name(adapter.base_name if adapter else path or "")
        return ModelSource(label, checkpoint, adapter, in_4bit, dtype, device)

    if lora_path:
        source = open_source(None, lora_path, load_in_4bit)
        adapted = Side(f"{source.label} + {short_name(lora_path)}", source, True)
        if not paths:
            return Side(source.label, source, False), adapted
        merged = open_source(paths[0], None, False)
        return adapted, Side(merged.label, merged, True)
    sources = [open_source(path, None, load_in_4bit) for path in paths]
    labels = paths if sources[0].label == sources[1].label else [source.label for source in sources]
    before, after = (Side(label, source, True) for label, source in zip(labels, sources, strict=True))
    return before, after


def with_prompt_text(sides: tuple[Side, Side], prompt_text: str | None) -> tuple[Side, Side]:
    """Return the two sides so that both put the same text before every question of the data.

    Args:
        sides: The models.
        prompt_text: The text; None: that of the training, which the adapter or a merged model records.

    Raises:
        UserError: See `agree_on`.
    """
    recorded = {side.source.checkpoint.tokenizer.prompt_text: side.label for side in sides}
    text = agree_on(recorded, prompt_text)
    sources = {id(side.source): side.source for side in sides}
    for key, source in sources.items():
        sources[key] = replace(source, checkpoint=replace(source.checkpoint, prompt_text=text))
    before, after = (replace(side, source=sources[id(side.source)]) for side in sides)
    return before, after
