"""Measure generation at 6B size against its baselines: random weights made in memory, one model after the other.

    python -m benchmarks.bench_decode
    python -m benchmarks.bench_decode --families chatglm2-6b --cases "fp16,int4" --output_json decode.json

Each family in fp16, NF4 (also with an unmerged adapter), int8 and int4, with and without the fast path, in batches and
at 2048 tokens; for ChatGLM2 also transformers' own model of the same mathematics. Writes
benchmarks/results/decode_baselines_<device>.json after each model; prints a table and, last, the JSON object.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from loguru import logger
from transformers import GlmForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from benchmarks.harness.cases import choose_cases, model_name
from benchmarks.harness.checkpoints import LORA_TARGETS
from benchmarks.harness.published import FIXTURES_DIR, find_family, published_model, small_ids
from benchmarks.harness.random_models import add_random_lora, compacted, quantize_to_nf4, random_model
from benchmarks.harness.results import FAILED, RESULTS_DIR, check_none_failed, device_name
from benchmarks.harness.stock_glm import glm_config, stock_generate
from glm_utils.checkpoint import load_classes, open_checkpoint
from glm_utils.cli import UserError, check_minimums, run_cli
from glm_utils.device import dtype_name, free_bytes
from glm_utils.family import PROJECT_DIR, Family
from glm_utils.files import read_json_object
from glm_utils.inference.measure import Generate, Workload, measure_model, stream_generate
from glm_utils.inference.memory import copy_bandwidth, reset_peak_memory
from glm_utils.inference.report import write_report
from glm_utils.inference.request import auto_dtype, prompt_ids
from glm_utils.report_file import check_report_path

PROMPT = "类型#裙*颜色#白色*风格#简约*图案#刺绣"
LONG_CONTEXT = 2048  # prompt and new tokens together
MIN_PROMPT = 16  # tokens of the prompt among them, special tokens included
SLOW_SHARE = 8  # launch-bound cases (50 tokens/s on an H200) generate an eighth of the tokens
MIN_VALUES = {"new_tokens": 2, "loop_number": 1}
BITS = {"int8": 8, "int4": 4}


class Case(NamedTuple):
    """One column of the table.

    Attributes:
        name: Its name after the family's.
        weights: Of the layers: float, nf4, int8 or int4.
        batch_size: Sequences at once.
        is_eager: Whether the fast path is off.
        is_native: Whether it is transformers' own model.
        is_generate: Whether `generate` of transformers is called, with a streamer.
        has_adapter: Whether the model has LoRA layers.
        is_long: Whether the prompt fills the long context.
    """

    name: str
    weights: str
    batch_size: int = 1
    is_eager: bool = False
    is_native: bool = False
    is_generate: bool = False
    has_adapter: bool = False
    is_long: bool = False

    def num_tokens(self, prompt_tokens: int, new_tokens: int) -> tuple[int, int]:
        """Return the lengths of prompt and answer."""
        if self.is_long:
            return LONG_CONTEXT - new_tokens, new_tokens
        is_slow = self.is_eager or self.is_native
        return prompt_tokens, max(MIN_VALUES["new_tokens"], new_tokens // SLOW_SHARE) if is_slow else new_tokens


CASES = (
    Case("fp16", "float"),
    Case("fp16 generate", "float", is_generate=True),
    Case("fp16 eager", "float", is_eager=True),
    Case("native", "float", is_native=True),
    Case("native batch 8", "float", 8, is_native=True),
    Case("nf4", "nf4"),
    Case("nf4 + adapter", "nf4", has_adapter=True),
    Case("nf4 eager", "nf4", is_eager=True),
    Case("int8", "int8"),
    Case("int4", "int4"),
    Case("int4 generate", "int4", is_generate=True),
    Case("int4 generate batch 8", "int4", 8, is_generate=True),
    Case("int4 eager", "int4", is_eager=True),
    Case("int4 batch 8", "int4", 8),
    Case("int4 batch 16", "int4", 16),
    Case("int4 at 2048 tokens", "int4", is_long=True),
)


def bench_decode(
    *,
    families: str = "chatglm2-6b,chatglm-6b",
    cases: str | None = None,
    scale: Literal["6b", "tiny"] = "6b",
    prompt_tokens: int = 32,
    new_tokens: int = 512,
    loop_number: int = 3,
    output_json: str | None = None,
) -> None:
    """Create and measure the models one after the other, on the first GPU or, without one, on the CPU in fp32.

    Args:
        families: Names joined by commas.
        cases: Names of cases joined by commas. Default: all.
        scale: 6b, or tiny: the size of the small models in models/.
        prompt_tokens: Length of the prompt.
        new_tokens: Tokens to generate; cases without the fast path generate an eighth.
        loop_number: Measured runs.
        output_json: Result file. Default: benchmarks/results/decode_baselines_<device>.json.
    """
    check_minimums(dict(locals()), MIN_VALUES)
    bases = [base_for(find_family(name), scale) for name in families.split(",")]
    chosen = [(base, case) for base in bases for case in choose_cases(CASES, cases) if base.has(case)]
    if not chosen:
        raise UserError(f"--cases {cases}: none for {families}; only ChatGLM2 has a native model")
    if new_tokens >= LONG_CONTEXT - MIN_PROMPT and any(case.is_long for _, case in chosen):
        limit = LONG_CONTEXT - MIN_PROMPT
        raise UserError(f"--new_tokens {new_tokens}: expected less than {limit}, or --cases without the long one")
    path = output_json or RESULTS_DIR / f"decode_baselines_{device_name()}.json"
    check_report_path(path)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    bandwidth = copy_bandwidth(device, free_bytes(device))
    result: dict = {"benchmark": "decode_baselines", "scale": scale, "copy_bytes_per_second": bandwidth, "models": []}
    for base, case in chosen:
        num_prompt, num_new = case.num_tokens(prompt_tokens, new_tokens)
        ids = prompt_ids(open_checkpoint(base.tokenizer_dir).tokenizer, PROMPT, num_prompt)
        workload = Workload(torch.tensor([ids] * case.batch_size, device=device), num_new, loop_number)
        result["models"].append(measure(base, case, workload, bandwidth))
        text = write_report(result, path)
    print(text)
    check_none_failed(result["models"])


class Base(NamedTuple):
    """What the models of a family are made from.

    Attributes:
        family: The family.
        name: In the table.
        config: Content of config.json.
        tokenizer_dir: Directory of a small tokenizer whose special ids are the config's.
    """

    family: Family
    name: str
    config: dict
    tokenizer_dir: Path

    def has(self, case: Case) -> bool:
        """Return whether there is a model for a case."""
        return not case.is_native or self.family.native_class is not None


def base_for(family: Family, scale: str) -> Base:
    """Return the published configuration of a family, or its small model's."""
    name = model_name(family, scale)
    if scale == "6b":
        config = published_model(family.name)["config"] | small_ids(family.name)
        return Base(family, name, config, FIXTURES_DIR / family.name / "model")
    directory = PROJECT_DIR / "models" / name
    return Base(family, name, read_json_object(directory / "config.json"), directory)


def measure(base: Base, case: Case, workload: Workload, bandwidth: float) -> dict:
    """Measure a case; return its column of the table. An error ends only this case.

    Args:
        base: The model's size.
        case: What is measured.
        workload: Its prompts and tokens.
        bandwidth: Of copies on the device, bytes per second.
    """
    device, (batch_size, num_prompt) = workload.input_ids.device, workload.input_ids.shape
    dtype = auto_dtype(base.config, base.tokenizer_dir / "config.json", device)
    found = {
        "label": f"{base.name} {case.name}",
        "family": base.family.name,
        "weight_format": dtype_name(dtype) if case.weights == "float" else case.weights,
        "batch_size": batch_size,
        "num_prompt_tokens": num_prompt,
        "num_new_tokens": workload.new_tokens,
    }
    logger.info(f"{found['label']}: batch {batch_size}, {num_prompt} + {workload.new_tokens} tokens")
    load = functools.partial(make_model, base, case, dtype, device)
    try:
        figures = measure_model(load, way_of(case), workload, bandwidth)
    except Exception as error:  # whatever it is, the other cases are worth measuring
        logger.opt(exception=error).error(f"{found['label']} failed")
        return {**found, "error": FAILED}
    figures.pop("load_seconds", None)  # the model was made, not loaded
    return found | figures


def way_of(case: Case) -> Callable[[PreTrainedModel, Workload], Generate]:
    """Return what makes the function that a case times."""
    if case.is_native:
        return stock_generate
    return streamed_generate if case.is_generate else functools.partial(stream_generate, fast_path=not case.is_eager)


class MarkingStreamer(BaseStreamer):
    """Note the moment of each new token; of the prompt, which comes first, nothing is noted."""

    def __init__(self, mark: Callable[[], None]):
        self.mark, self.is_prompt = mark, True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt or the next tokens."""
        if not self.is_prompt:
            self.mark()
        self.is_prompt = False

    def end(self) -> None:
        """Take the end."""


def streamed_generate(model: PreTrainedModel, workload: Workload) -> Generate:
    """Return a function that calls `generate` as a program does that shows the answer as it comes."""
    input_ids = workload.input_ids

    def generate(mark: Callable[[], None]) -> int:
        ids = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=workload.new_tokens,
            do_sample=False,
            eos_token_id=None,
            streamer=MarkingStreamer(mark),
        )
        return ids.shape[1] - input_ids.shape[1]

    return generate


def make_model(base: Base, case: Case, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Make a case's model and reset the peak of memory, which is then free of the unquantized weights."""
    if case.is_native:
        model = random_model(GlmForCausalLM, glm_config(base.config, base.tokenizer_dir), dtype, device)
    else:
        classes = load_classes(base.family)
        model = random_model(classes.model, classes.config.from_dict(base.config), dtype, device)
    if case.weights == "nf4":
        quantize_to_nf4(model, dtype)
    elif case.weights in BITS:
        model.quantize(BITS[case.weights])
    if case.has_adapter:
        model = add_random_lora(model, LORA_TARGETS)
    if case.weights != "float":
        model = compacted(model, device)
    reset_peak_memory(device)
    return model


if __name__ == "__main__":
    run_cli(bench_decode)
