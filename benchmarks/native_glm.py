"""The baseline for our generation: transformers' own GlmForCausalLM at the size of a ChatGLM2 model.

ChatGLM2-6B is a Glm: the same mathematics, so the config is enough and the weights are random. Generation is the plain
`generate` of transformers with a dynamic cache.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GlmConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from glm_utils.checkpoint import load_classes
from glm_utils.cli import UserError
from glm_utils.family import detect_family
from glm_utils.inference_measure import Generate, Workload
from glm_utils.native_glm import native_config


def glm_config(config: dict, path: Path) -> GlmConfig:
    """Translate a ChatGLM2 config as the export to GlmForCausalLM does.

    Args:
        config: Parsed config.json.
        path: Where it lies, for the error.

    Raises:
        UserError: Another family's.
    """
    family = detect_family(config, path)
    if family.native_class is None:
        raise UserError("only ChatGLM2 has a native counterpart in transformers. Leave the case native out")
    return GlmConfig.from_dict(native_config(load_classes(family).config.from_dict(config), family.native_class))


class MarkEachToken(StoppingCriteria):
    """Call a function after each token and never stop."""

    def __init__(self, mark: Callable[[], None]):
        self.mark = mark

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        """Return False for each sequence."""
        self.mark()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def native_generate(model: PreTrainedModel, workload: Workload) -> Generate:
    """Return a function that generates greedily; an end token does not stop it."""
    input_ids = workload.input_ids

    def generate(mark: Callable[[], None]) -> int:
        ids = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=workload.new_tokens,
            do_sample=False,
            eos_token_id=None,
            stopping_criteria=StoppingCriteriaList([MarkEachToken(mark)]),
        )
        return ids.shape[1] - input_ids.shape[1]

    return generate
