"""Measure transformers' own GlmForCausalLM at the size of a ChatGLM2 model: the baseline for our generation.

    python benchmarks/native_glm.py --model_path DIR --prompt_tokens 64

ChatGLM2-6B is a Glm: the same mathematics, so the config is enough and the weights are random. Generation is the plain
`generate` of transformers with a dynamic cache. The last line of stdout is one JSON object, as from inference_test.py.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import GlmConfig, GlmForCausalLM, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from glm_utils.checkpoint import load_classes
from glm_utils.checkpoint_files import read_json_object
from glm_utils.cli import UserError, run_cli
from glm_utils.family import detect_family
from glm_utils.inference_job import auto_dtype, dtype_name, free_bytes
from glm_utils.inference_measure import Generate, Workload, measure_model
from glm_utils.inference_memory import copy_bandwidth
from glm_utils.inference_report import write_report
from glm_utils.native_glm import native_config

FAMILY = "chatglm2-6b"


def native_glm(
    *,
    model_path: str,
    prompt_tokens: int,
    new_tokens: int = 128,
    batch_size: int = 1,
    loop_number: int = 5,
    output_json: str | None = None,
) -> None:
    """Measure the native model.

    Args:
        model_path: Directory of a ChatGLM2 model; only its config.json is read.
        prompt_tokens: Length of the prompt.
        new_tokens: Tokens to generate.
        batch_size: Sequences at once.
        loop_number: Measured repeats.
        output_json: File for the JSON object that is also printed.
    """
    config_path = Path(model_path) / "config.json"
    published = read_json_object(config_path)
    config = glm_config(published, config_path)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    dtype = auto_dtype(published, Path(model_path), device)
    bandwidth = copy_bandwidth(device, free_bytes(device))
    input_ids = torch.arange(prompt_tokens, device=device).repeat(batch_size, 1) % config.vocab_size
    workload = Workload(input_ids, new_tokens, loop_number)
    load = functools.partial(random_glm, config, dtype, device)
    row = {"label": "native Glm", "family": FAMILY, "weight_format": dtype_name(dtype)}
    row |= measure_model(load, native_generate, workload, bandwidth)
    print(write_report({"copy_bytes_per_second": bandwidth, "models": [row]}, output_json))


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


def random_glm(config: GlmConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Make a model with random weights on a device."""
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return GlmForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default_dtype)


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


if __name__ == "__main__":
    run_cli(native_glm)
