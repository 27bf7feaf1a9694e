"""Train on a file of 10 million rows: time to the first step, memory, and the row at which a killed run goes on.

    python -m benchmarks.bench_large_file --work_dir /data/bench

The rows come from the grammar of data/, so they are as long as ADGEN's. Four starts of train_qlora.py on a tiny model,
packed: with a file of 1.1 million rows, which is streamed too; with the large one; the same, killed behind its third
step; and resumed. Memory is the resident set, read every 50 ms. Which examples a process reads is recorded by a
wrapper around the dataset. Writes benchmarks/results/large_file.json and prints it.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks.harness.results import RESULTS_DIR, provenance, write_result
from glm_utils.cli import UserError, run_cli
from glm_utils.family import PROJECT_DIR
from glm_utils.run_record import sha256
from tools.make_data import make_examples

NUM_STEPS, SAVE_STEPS, KILLED_AT, BATCH_SIZE = 6, 2, 3, 8
NUM_DRAWN, SEED = 50_000, 20261126  # examples that are drawn; each row is one of them with a number of its own
SECONDS_BETWEEN = 0.05
ARGS = {
    "per_device_train_batch_size": BATCH_SIZE,
    "max_steps": NUM_STEPS,
    "save_steps": SAVE_STEPS,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "report_to": "none",
    "disable_tqdm": True,
}
# runs the script, and writes the number of every example that its dataset is asked for
TRACED = """
import sys
from glm_utils.cli import run_cli
from glm_utils.training import streamed
from train_qlora import train_qlora
trace, get = open(sys.argv.pop(1), "w", buffering=1), streamed.StreamedDataset.__getitem__
def traced(self, index):
    trace.write(f"{index}\\n")
    return get(self, index)
streamed.StreamedDataset.__getitem__ = traced
run_cli(train_qlora)
"""


def bench_large_file(*, work_dir: str, num_rows: int = 10_000_000, num_rows_small: int = 1_100_000) -> None:
    """Make the files, and train on them.

    Args:
        work_dir: Directory to create for the benchmark's files, 5 GB; deleted afterwards.
        num_rows: Rows of the large file.
        num_rows_small: Rows of the one it is compared with.
    """
    root = Path(work_dir).resolve()
    if root.exists():
        raise UserError(f"--work_dir {root}: exists. Give a new directory")
    root.mkdir(parents=True)
    try:
        small, large = root / "small.jsonl", root / "large.jsonl"
        result: dict = {"benchmark": "large_file", "steps": NUM_STEPS, "examples_per_step": BATCH_SIZE, "files": {}}
        for path, count in ((small, num_rows_small), (large, num_rows)):
            seconds = write_rows(path, count)
            result["files"][path.stem] = {"rows": count, "bytes": path.stat().st_size, "seconds_to_write": seconds}
        start = time.perf_counter()
        sha256(large)
        result["seconds_to_hash_large"] = time.perf_counter() - start
        result["small"] = train(root, "small", small)
        result["large"] = train(root, "large", large)
        result["killed"] = train(root, "killed", large, killed_at=KILLED_AT)
        result["resumed"] = train(root, "killed", large, "--resume_from_checkpoint", "latest")
        result |= compare(root, result["large"], result["resumed"])
        for name in ("small", "killed"):
            del result[name]["examples"]
        write_result(RESULTS_DIR / "large_file.json", result | provenance())
        print(json.dumps(result))
    finally:
        shutil.rmtree(root, ignore_errors=True)


def write_rows(path: Path, num_rows: int) -> float:
    """Write rows that all differ; return the seconds."""
    start = time.perf_counter()
    drawn = make_examples(NUM_DRAWN, SEED)
    with path.open("w", encoding="utf-8", buffering=1 << 20) as file:
        for number in range(num_rows):
            example = drawn[number % NUM_DRAWN]
            file.write(f'{{"content": "{example["content"]}*货号#{number}", "summary": "{example["summary"]}"}}\n')
    return time.perf_counter() - start


def train(root: Path, name: str, data_path: Path, *flags: str, killed_at: int | None = None) -> dict:
    """Run the training; return its times and its memory.

    Args:
        root: The benchmark's directory.
        name: Name of its output directory.
        data_path: The data.
        *flags: Further flags.
        killed_at: The step behind which it is killed; None: it ends.
    """
    args_path, trace_path = root / f"{name}.json", root / f"{name}{len(flags)}.trace"
    args_path.write_text(json.dumps({**ARGS, "output_dir": str(root / name)}), encoding="utf-8")
    command = [sys.executable, "-c", TRACED, str(trace_path), "--model_name_or_path=models/chatglm2-tiny"]
    command += [f"--train_args_json={args_path}", f"--train_data_path={data_path}", *flags]
    load, start = os.getloadavg()[0], time.perf_counter()
    process = subprocess.Popen(command, cwd=PROJECT_DIR, stderr=subprocess.PIPE, text=True)
    found: dict = {"load_before": load, "seconds_to_first_step": None, "resident_mib": []}
    watcher = threading.Thread(target=watch, args=(process.pid, start, found["resident_mib"]))
    watcher.start()
    log = []
    for line in process.stderr:
        log.append(line)
        if step := re.search(rf"step (\d+)/{NUM_STEPS}: loss", line):
            if found["seconds_to_first_step"] is None:
                used = psutil.Process(process.pid).cpu_times()
                found["seconds_to_first_step"] = time.perf_counter() - start
                found["cpu_seconds_to_first_step"] = used.user + used.system
            if killed_at == int(step[1]):
                process.kill()
    watcher.join()
    if process.wait() and killed_at is None:
        raise UserError(f"the training failed:\n{''.join(log)[-3000:]}")
    found["peak_mib"] = max(mib for _, mib in found["resident_mib"])
    found["resident_mib"] = found["resident_mib"][:: max(1, len(found["resident_mib"]) // 60)]
    return found | {"examples": read_trace(trace_path)}


def watch(pid: int, start: float, samples: list[tuple[float, int]]) -> None:
    """Note the resident set of a process until it ends: seconds since the start, MiB."""
    process = psutil.Process(pid)
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE:  # ended, but nobody has asked for its exit code yet
            samples.append((round(time.perf_counter() - start, 2), process.memory_info().rss >> 20))
            time.sleep(SECONDS_BETWEEN)


def read_trace(path: Path) -> list[int]:
    """Return the examples that a training read for its batches, in order."""
    indices = [int(line) for line in path.read_text("utf-8").split()]
    return indices[5:]  # before: the one that is shown, and the batch of 4 whose memory is measured


def compare(root: Path, whole: dict, resumed: dict) -> dict:
    """Compare the run that was killed and resumed with the one that was not; the lists of examples are taken out."""
    expected, found = whole.pop("examples"), resumed.pop("examples")
    num_done = SAVE_STEPS * (KILLED_AT // SAVE_STEPS) * BATCH_SIZE
    losses = [dict(read_losses(root / name)) for name in ("large", "killed")]
    weights = [sha256(root / name / "adapter_model.safetensors") for name in ("large", "killed")]
    return {
        "resumed_at_step": num_done // BATCH_SIZE,
        "first_examples_after_resuming": found[:8],
        "same_examples": found == expected[num_done:],
        "same_losses": losses[0] == losses[1],
        "same_weights": weights[0] == weights[1],
    }


def read_losses(output_dir: Path) -> Iterator[tuple[int, float]]:
    """Yield step and loss of a finished training."""
    for entry in json.loads((output_dir / "trainer_state.json").read_text("utf-8"))["log_history"]:
        if "loss" in entry:
            yield entry["step"], entry["loss"]


if __name__ == "__main__":
    run_cli(bench_large_file)
