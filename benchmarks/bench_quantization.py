"""Measure int8 and int4 quantization: weight error, what it does to the tiny models' answers, time for a 6B model.

    python -m benchmarks.bench_quantization --parts weights,models
    python -m benchmarks.bench_quantization --parts speed --device cuda

Each part writes benchmarks/results/quantization_<part>.json and prints it as one JSON line. `weights`: squared
relative error of rows as long as ChatGLM2-6B's. `models`: KL divergence to the unquantized model and share of tokens
with the same first choice, on the sample's dev examples. `speed`: all layers of ChatGLM2-6B, random weights on the
device.
"""

import json
import time

import torch

from benchmarks.harness.published import layer_shapes, remote_function
from benchmarks.harness.results import RESULTS_DIR, provenance, write_result
from glm_utils.checkpoint import open_checkpoint
from glm_utils.cli import UserError, run_cli
from glm_utils.data import read_examples
from glm_utils.family import LINEAR_NAMES, PROJECT_DIR
from glm_utils.load_model import load_base_model
from glm_utils.merging.arithmetic import nf4_round_trip

NUM_LAYERS = 28
METHODS = ("int4 absmax", "int4 search", "int8 absmax", "int8 search", "nf4")
TINY_MODELS = ("models/chatglm-tiny", "models/chatglm2-tiny")
NUM_EXAMPLES = 64


def round_trip(weight: torch.Tensor, method: str) -> torch.Tensor:
    """Quantize a weight [out, in] by a method of METHODS and return it dequantized, in its dtype."""
    if method == "nf4":
        return nf4_round_trip(weight)
    bits, how = int(method[3]), method.split()[1]
    stored, scale = remote_function("quantization.quantize_rows")(weight, bits, how)
    return remote_function("quantization.dequantize_rows")(stored, scale, bits, weight.dtype)


def squared_relative_error(weight: torch.Tensor, dequantized: torch.Tensor) -> float:
    """Return the squared error over the squared norm."""
    return ((weight.float() - dequantized.float()).square().sum() / weight.float().square().sum()).item()


def measure_weights(device: str) -> dict:
    """Return the squared relative error by distribution, row length and method."""
    errors = {}
    generator = torch.Generator().manual_seed(0)
    for columns in (4096, 13696):
        normal = torch.randn(256, columns, generator=generator)
        chi_squared = torch.randn(3, 256, columns, generator=generator).square().sum(0)
        for kind, weight in {"gaussian": normal, "student_t3": normal / (chi_squared / 3).sqrt()}.items():
            weight = (0.02 * weight).half().to(device)
            errors[f"{kind} {columns}"] = {
                name: squared_relative_error(weight, round_trip(weight, name)) for name in METHODS
            }
    return {"squared_relative_error": errors}


@torch.no_grad()
def measure_models(device: str) -> dict:
    """Return error, KL divergence (nats per token) and same-top-token share by tiny model and method."""
    examples = read_examples(PROJECT_DIR / "data" / "dev.jsonl")[:NUM_EXAMPLES]
    results = {}
    for name in TINY_MODELS:
        model_dir = PROJECT_DIR / name
        tokenizer = open_checkpoint(model_dir).tokenizer
        texts = [
            tokenizer.encode_prompt(example.query) + tokenizer.encode_answer(example.answer) for example in examples
        ]
        model = load_base_model(open_checkpoint(model_dir)).to(device).eval()
        expected = [log_probabilities(model, ids) for ids in texts]
        weights = linear_weights(model)
        originals = [weight.data.clone() for weight in weights]
        results[name] = {"num_tokens": sum(map(len, texts)), "num_rows": len(examples)}
        for method in METHODS:
            for weight, original in zip(weights, originals, strict=True):
                weight.data = round_trip(original.half(), method).float()
            results[name][method] = compare(model, texts, expected, weights, originals)
    return {"models": results}


def linear_weights(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the weights of the four Linear modules of every layer."""
    return [module.weight for path, module in model.named_modules() if path.rpartition(".")[2] in LINEAR_NAMES]


def log_probabilities(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Return log probabilities of the next token at each position, fp32 [T, V]."""
    device = next(model.parameters()).device
    return model(input_ids=torch.tensor([ids], device=device)).logits[0].float().log_softmax(-1)


def compare(model, texts: list[list[int]], expected: list[torch.Tensor], weights: list, originals: list) -> dict:
    """Compare a quantized model with its original, token by token."""
    divergence, num_same, num_tokens = 0.0, 0, 0
    for ids, before in zip(texts, expected, strict=True):
        after = log_probabilities(model, ids)
        divergence += (before.exp() * (before - after)).sum().item()
        num_same += (before.argmax(-1) == after.argmax(-1)).sum().item()
        num_tokens += len(ids)
    energy = sum(original.square().sum().item() for original in originals)
    pairs = zip(weights, originals, strict=True)
    error = sum((weight.data - original).square().sum().item() for weight, original in pairs) / energy
    return {
        "squared_relative_error": error,
        "kl_nats_per_token": divergence / num_tokens,
        "same_top_token_share": num_same / num_tokens,
    }


def measure_speed(device: str) -> dict:
    """Return the seconds for quantizing every layer of a 6B model whose fp16 weights are on the device."""
    if device == "cpu":
        raise UserError("--parts speed needs --device cuda")
    quantize_rows = remote_function("quantization.quantize_rows")
    weights = [
        0.02 * torch.randn(shape, device=device, dtype=torch.float16)
        for _ in range(NUM_LAYERS)
        for shape in layer_shapes("chatglm2-6b")
    ]
    result = {"num_weights": sum(weight.numel() for weight in weights)}
    for bits in (4, 8):
        for method in ("search", "absmax"):
            quantize_rows(weights[0], bits, method)  # warm-up
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, start = torch.cuda.memory_allocated(), time.perf_counter()
            for weight in weights:
                quantize_rows(weight, bits, method)
            torch.cuda.synchronize()
            result[f"int{bits} {method}"] = {
                "seconds": time.perf_counter() - start,
                "extra_peak_bytes": torch.cuda.max_memory_allocated() - before,
            }
    return result


PARTS = {"weights": measure_weights, "models": measure_models, "speed": measure_speed}


def bench_quantization(*, parts: str = "weights,models", device: str = "cpu") -> None:
    """Run parts of the benchmark.

    Args:
        parts: Names joined by commas: weights, models, speed.
        device: cpu or cuda.
    """
    for part in parts.split(","):
        if part not in PARTS:
            raise UserError(f"--parts {part}: expected some of {', '.join(PARTS)}")
    for part in parts.split(","):
        result = {"benchmark": f"quantization_{part}", **PARTS[part](device), **provenance()}
        write_result(RESULTS_DIR / f"quantization_{part}.json", result)
        print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    run_cli(bench_quantization)
