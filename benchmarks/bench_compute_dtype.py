"""Train one model on the same examples with the same seed in fp32 and in bf16, and compare the evaluation losses.

    python -m benchmarks.bench_compute_dtype
    python -m benchmarks.bench_compute_dtype --size 1b --train_data_path train.jsonl --eval_data_path dev.jsonl

The first command trains the two tiny models, the second (on a GPU) a ChatGLM2 of 1.1 B random weights. Every run is
`train_qlora.py` with the family's JSON file except for the settings in SIZES, in its own process. An fp32 run with
another seed gives the scale. On a CPU `--compute_dtype bf16` leaves more in fp32 than on a GPU, so there the run
bf16-model has the number formats of a GPU. Writes results/compute_dtype_<model>_<device>.json after each run.
"""

import json
import multiprocessing
import tempfile
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from benchmarks.harness.checkpoints import write_random_checkpoint
from benchmarks.harness.results import RESULTS_DIR, device_name, provenance, write_result
from benchmarks.harness.train_steps import run_train_qlora
from glm_utils.checkpoint import open_checkpoint
from glm_utils.cli import UserError, run_cli
from glm_utils.early_checks import project_path
from glm_utils.family import PROJECT_DIR
from glm_utils.load_model import load_base_model
from glm_utils.merging.shards import CheckpointReader
from glm_utils.run_record import sha256
from glm_utils.training import lora_model

NUM_EVALUATIONS = 4  # and one before the first step
SEED = 42
ON_GPU = torch.cuda.is_available()
GPU_BF16 = "activations, frozen weights and matmuls bf16; LoRA weights, optimizer and rotary angles fp32"
CPU_BF16 = "matmuls of the 4-bit and LoRA layers bf16; everything else fp32"
RUNS = {  # flags of train_qlora.py, and what the number format covers
    "fp32": (["--compute_dtype", "fp32"], "everything fp32, without TF32"),
    "bf16": (["--compute_dtype", "bf16"], GPU_BF16 if ON_GPU else CPU_BF16),
    **({} if ON_GPU else {"bf16-model": (["--compute_dtype", "bf16"], GPU_BF16)}),
    "fp32-other-seed": (["--compute_dtype", "fp32", "--seed", str(SEED + 1)], "as fp32"),
}
RANDOM_CONFIG = {  # ChatGLM2 with 1.1 B weights
    "hidden_size": 2048,
    "num_layers": 16,
    "num_attention_heads": 16,
    "multi_query_group_num": 2,
    "ffn_hidden_size": 6848,
}


class Size(NamedTuple):
    """What is trained: base models (none: random weights), steps, examples per step, and settings."""

    model_paths: tuple[str, ...]
    steps: int
    batch_size: int
    learning_rate: float
    flags: tuple[str, ...]


SIZES = {
    "tiny": Size(("models/chatglm2-tiny", "models/chatglm-tiny"), 200, 16, 2e-3, ("--lora_rank", "8")),
    "1b": Size((), 60, 32, 2e-3, ("--lora_rank", "32", "--lora_targets", "all-linear")),
}


def bench_compute_dtype(
    *,
    size: Literal["tiny", "1b"] = "tiny",
    model_path: str | None = None,
    train_data_path: str = "data/train.jsonl",
    eval_data_path: str = "data/dev.jsonl",
    steps: int | None = None,
    learning_rate: float | None = None,
    work_dir: str | None = None,
    results_dir: str = str(RESULTS_DIR),
) -> None:
    """Train each model of a size in each number format.

    Args:
        size: tiny, or 1b for random weights.
        model_path: This base alone, with the settings of the size.
        train_data_path: Data file to train on.
        eval_data_path: Data file whose loss is compared.
        steps: Optimizer steps. Default: the size's.
        learning_rate: Peak of the schedule. Default: the size's.
        work_dir: For temporary files. Default: the system's directory for them.
        results_dir: Directory of the result files.
    """
    chosen = SIZES[size]
    chosen = chosen._replace(steps=steps or chosen.steps, learning_rate=learning_rate or chosen.learning_rate)
    paths = {"train": project_path(train_data_path), "eval": project_path(eval_data_path)}
    for parent in filter(None, (work_dir, results_dir)):
        Path(parent).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="compute-dtype-", dir=work_dir) as temporary_dir:
        root = Path(temporary_dir)
        if not model_path and not chosen.model_paths:
            model_path = str(root / f"chatglm2-{size}")
            write_random_checkpoint(Path(model_path), "chatglm2-6b", bin_files=False, config_overrides=RANDOM_CONFIG)
        for path in [model_path] if model_path else chosen.model_paths:
            compare(project_path(path), chosen, paths, root, Path(results_dir))


def compare(model_dir: Path, size: Size, data_paths: dict[str, Path], root: Path, results_dir: Path) -> None:
    """Make all runs of a model, write their result and print it as a table."""
    family = open_checkpoint(model_dir).family
    device = device_name()
    values = json.loads((PROJECT_DIR / family.train_args_json).read_text())
    del values["output_dir"]  # each run has its own
    values |= {"max_steps": size.steps, "learning_rate": size.learning_rate, "seed": SEED}
    values |= {"per_device_train_batch_size": size.batch_size, "gradient_accumulation_steps": 1, "logging_steps": 10}
    values |= {"eval_on_start": True, "eval_steps": max(1, size.steps // NUM_EVALUATIONS)}
    values |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    flags = ["--model_name_or_path", str(model_dir), *size.flags]
    for name, path in data_paths.items():
        flags += [f"--{name}_data_path", str(path)]
    specs = CheckpointReader(model_dir).specs.values()
    result = {
        "benchmark": "compute_dtype",
        "model": model_dir.name,
        "num_weights": sum(torch.Size(spec.shape).numel() for spec in specs),
        "run_on": device,
        "training_args": dict(values),
        "flags": list(size.flags),
        "data": {name: {"file": path.name, "sha256": sha256(path)} for name, path in data_paths.items()},
        **provenance(),
        "runs": {},
    }
    for run, (run_flags, meaning) in RUNS.items():
        output_dir = root / f"{model_dir.name}-{run}"
        args_path = root / f"{output_dir.name}.json"
        args_path.write_text(json.dumps(values | {"output_dir": str(output_dir)}))
        arguments = ["--train_args_json", str(args_path), *flags, *run_flags]
        process = multiprocessing.get_context("spawn").Process(target=train, args=(arguments, run == "bf16-model"))
        process.start()
        process.join()
        if process.exitcode:
            raise UserError(f"{model_dir.name} in {run}: exit code {process.exitcode}; the lines above say why")
        result["runs"][run] = {"number_format": meaning, **read_run(output_dir)}
        losses = {name: found["eval_loss"] for name, found in result["runs"].items()}
        result["relative_difference"] = relative_differences(losses)
        write_result(results_dir / f"compute_dtype_{model_dir.name}_{device}.json", result)
    print(table(model_dir.name, device, losses, result["relative_difference"]), flush=True)


def train(arguments: list[str], cast_all: bool) -> None:
    """Run train_qlora.py in this process.

    Args:
        arguments: Its command line.
        cast_all: Whether all frozen weights, and with them the activations, have the compute dtype on a CPU too.
    """
    if cast_all:
        lora_model.load_base_model = lambda *args, dtype=None, **kwargs: load_base_model(*args, **kwargs)
    run_train_qlora(arguments)


def read_run(output_dir: Path) -> dict:
    """Return the losses of a run, by step, and what it took."""
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    results = json.loads((output_dir / "train_results.json").read_text())
    found = {f"{key}_loss": {log["step"]: log[name] for log in history if name in log}
             for key, name in (("eval", "eval_loss"), ("train", "loss"))}  # fmt: skip
    found |= {"seconds": results["train_runtime"], "tokens_per_second": results["train_tokens_per_second"]}
    return found | {key: results[key] for key in ("peak_memory_bytes",) if key in results}


def relative_differences(losses: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    """Return (loss - fp32's) / fp32's by run and step, for all runs but fp32.

    Args:
        losses: By run and step.
    """
    reference = losses["fp32"]
    return {
        run: {step: loss / reference[step] - 1 for step, loss in by_step.items()}
        for run, by_step in losses.items()
        if run != "fp32"
    }


def table(model: str, device: str, losses: dict[str, dict], differences: dict[str, dict]) -> str:
    """Return the evaluation losses as a Markdown table, with the difference after the last step."""
    steps = list(losses["fp32"])
    lines = [f"| {model}, {device} | " + " | ".join(f"step {step}" for step in steps) + " | against fp32 |"]
    lines.append("|---" * (len(steps) + 2) + "|")
    for run, by_step in losses.items():
        last = f"{differences[run][steps[-1]]:+.2%}" if run in differences else ""
        lines.append(f"| {run} | " + " | ".join(f"{by_step[step]:.4f}" for step in steps) + f" | {last} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(bench_compute_dtype)
