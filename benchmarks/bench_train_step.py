"""Measure training at 6B size against a plain bf16 Trainer and the recipe of chatGLM-6B-QLoRA, each in a process.

    python -m benchmarks.random_checkpoint --output_path /data/random-6b --bin_files False
    python -m benchmarks.bench_train_step --model_path /data/random-6b --train_data_path adgen_train.jsonl

Runs named stock-* build transformers' native Glm with peft and bitsandbytes and use its Trainer as it is; runs named
loop-* are a plain loop over this project's model, profiled; all others are the shipped command, `train_qlora.py`.
Tokens are those of the examples, without padding. Adds this start's runs to
benchmarks/results/train_<family>_<device>.json after each run; rates compare within a start.
"""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import peft
import torch
from filelock import FileLock

from benchmarks.harness.checkpoints import LORA_TARGETS
from benchmarks.harness.results import RESULTS_DIR, device_name, provenance, write_result
from benchmarks.harness.stock_glm import stock_train
from benchmarks.harness.train_steps import (
    DEVICE,
    WARM_UP_STEPS,
    encode_file,
    profiled,
    run_train_qlora,
    synchronize,
)
from glm_utils.checkpoint import open_checkpoint
from glm_utils.cli import UserError, run_cli
from glm_utils.collators import PackingCollator
from glm_utils.family import PROJECT_DIR
from glm_utils.files import read_json_object
from glm_utils.load_model import load_base_model
from glm_utils.training.lora_matmul import use_lean_matmuls
from glm_utils.training.lora_model import make_lora_config, use_expandable_segments

MODULE = "benchmarks.bench_train_step"
GIB, SHIPPED_BATCH = 1 << 30, 32
RECIPE = {"batch": 4, "parts": 8, "steps": 3, "fp32": True, "checkpointing": True}
RUNS = {  # batch: examples; parts: gradient accumulation steps; limit: GiB; flags: of train_qlora.py
    "shipped": {"batch": SHIPPED_BATCH, "steps": 60},
    "7.5-gib": {"batch": SHIPPED_BATCH, "steps": 25, "limit": 7.5},
    "11-gib": {"batch": SHIPPED_BATCH, "steps": 25, "limit": 11.0},
    "11-gib-half": {"batch": SHIPPED_BATCH // 2, "parts": 2, "steps": 20, "limit": 11.0},
    "largest": {"batch": 128, "steps": 12},
    "recipe-rows": {"batch": 4, "parts": 8, "steps": 12, "checkpointing": True},
    "all-linear": {
        "batch": SHIPPED_BATCH, "steps": 25, "flags": ["--lora_targets", "all-linear", "--lora_rank", "16"]
    },
    "padded": {"batch": SHIPPED_BATCH, "steps": 20, "flags": ["--packing", "false"]},
    "loop-4bit": {"batch": SHIPPED_BATCH, "steps": 25},
    "loop-unquantised": {"batch": SHIPPED_BATCH, "steps": 25, "unquantised": True},
    "stock-bf16": {"batch": SHIPPED_BATCH, "steps": 25},
    "stock-bf16-checkpointing": {"batch": SHIPPED_BATCH, "steps": 25, "checkpointing": True},
    "stock-recipe": RECIPE,
}  # fmt: skip


def bench_train_step(
    *,
    model_path: str,
    train_data_path: str = "data/train.jsonl",
    runs: list[str] | str = "all",
    run: str | None = None,
    work_dir: str = tempfile.gettempdir(),
    results_dir: str = str(RESULTS_DIR),
    max_seconds: int = 900,
) -> None:
    """Measure each run in its own process.

    Args:
        model_path: A 6B-size base, e.g. from benchmarks.random_checkpoint.
        train_data_path: Data file; the lengths of its examples matter, their text does not.
        runs: Names joined by commas, or all.
        run: Used by the processes: the one run to make now.
        work_dir: For the runs' output directories and logs.
        results_dir: For the result.
        max_seconds: For all runs together.
    """
    if run:
        with FileLock(Path(work_dir) / "bench_train.lock"):  # imports overlap, measurements do not
            print("RESULT " + json.dumps(measure(run, Path(model_path), train_data_path, Path(work_dir))), flush=True)
        return
    names = list(RUNS) if runs == "all" else [runs] if isinstance(runs, str) else runs
    unknown = [name for name in names if name not in RUNS]
    if unknown:
        raise UserError(f"--runs {', '.join(unknown)}: expected some of {', '.join(RUNS)}")
    family = open_checkpoint(model_path).family
    path = Path(results_dir) / f"train_{family.name}_{device_name()}.json"
    result = {"benchmark": "train_step", "family": family.name, "starts": []}
    if path.exists():
        result = read_json_object(path)
    start = {**provenance(), "runs": {}}
    result["starts"].append(start)
    deadline = time.monotonic() + max_seconds
    common = ["--model_path", model_path, "--train_data_path", train_data_path, "--work_dir", work_dir]
    processes = {}
    try:
        for index, name in enumerate(names):
            for ahead in names[index : index + 4]:  # the next processes import while this one measures
                if ahead not in processes:
                    command = [sys.executable, "-m", MODULE, "--run", ahead, *common]
                    log = (Path(work_dir) / f"bench_train_{ahead}.log").open("w+")
                    processes[ahead] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT), log
            process, log = processes[name]
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(1, deadline - time.monotonic()))
            process.kill()
            log.seek(0)
            text = log.read()
            found = re.search(r"^RESULT (.*)$", text, re.MULTILINE)
            start["runs"][name] = json.loads(found[1]) if found else {"error": text[-600:]}
            write_result(path, result)
            print(name, json.dumps(start["runs"][name]), flush=True)
    finally:
        for process, _ in processes.values():
            process.kill()


def measure(name: str, model_dir: Path, train_data_path: str, work_dir: Path) -> dict:
    """Make one run; return its settings, tokens per second and peak memory."""
    settings = RUNS[name]
    if "limit" in settings:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(settings["limit"] * GIB / total)
    kind = {"stock": stock_train, "loop": loop_run}.get(name.partition("-")[0], shipped_run)
    result = kind(settings, model_dir, train_data_path, Path(tempfile.mkdtemp(dir=work_dir)))
    peaks = {
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
    }
    return {**settings, **result, **peaks}


def shipped_run(settings: dict, model_dir: Path, train_data_path: str, work_dir: Path) -> dict:
    """Run train_qlora.py in this process, with the family's JSON file and LoRA of rank 8."""
    family = open_checkpoint(model_dir).family
    values = json.loads((PROJECT_DIR / family.train_args_json).read_text())
    values |= {"output_dir": str(work_dir / "out"), "max_steps": settings["steps"], "logging_steps": 10}
    values |= {"eval_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    values |= {
        "per_device_train_batch_size": settings["batch"],
        "gradient_accumulation_steps": settings.get("parts", 1),
    }
    if "checkpointing" in settings:
        values["gradient_checkpointing"] = settings["checkpointing"]
    (work_dir / "args.json").write_text(json.dumps(values))
    flags = ["--train_args_json", str(work_dir / "args.json"), "--model_name_or_path", str(model_dir)]
    flags += ["--train_data_path", train_data_path, "--lora_rank", "8", *settings.get("flags", [])]
    run_train_qlora(flags)
    results = json.loads((work_dir / "out" / "train_results.json").read_text())
    return {"tokens_per_second": results["train_tokens_per_second"], "train_loss": results["train_loss"]}


def loop_run(settings: dict, model_dir: Path, train_data_path: str, work_dir: Path) -> dict:
    """Run steps of this project's model without a Trainer, on batches made beforehand, and profile two."""
    dataset, _ = encode_file(model_dir, train_data_path)
    four_bit = not settings.get("unquantised")
    use_expandable_segments()
    base = load_base_model(open_checkpoint(model_dir), four_bit, "bf16", {"": DEVICE})
    model = peft.get_peft_model(base, make_lora_config(8, 32, 0.05, LORA_TARGETS)).train()
    use_lean_matmuls(model)
    size = settings["batch"]
    batches = [
        {
            key: value.to(DEVICE) if torch.is_tensor(value) else value
            for key, value in PackingCollator()(
                [dataset[(start * size + index) % len(dataset)] for index in range(size)]
            ).items()
        }
        for start in range(settings["steps"])
    ]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=3e-4, fused=True)

    def step(batch: dict) -> None:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for batch in batches[:WARM_UP_STEPS]:
        step(batch)
    synchronize()
    start = time.perf_counter()
    for batch in batches[WARM_UP_STEPS:]:
        step(batch)
    synchronize()
    seconds = time.perf_counter() - start
    num_tokens = sum(batch["input_ids"].numel() for batch in batches[WARM_UP_STEPS:])
    return {"tokens_per_second": num_tokens / seconds, "profile": profiled(step, batches[:2])}


if __name__ == "__main__":
    run_cli(bench_train_step)
