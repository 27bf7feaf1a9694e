"""The training benchmark from end to end on a tiny model: a shipped run, a plain loop and the stock yardstick."""

import json
import subprocess
import sys

import pytest

from glm_utils.family import PROJECT_DIR


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    runs = ["recipe-rows", "loop-4bit", "stock-recipe"]
    command = [sys.executable, "benchmarks/bench_train_step.py", "--runs", ",".join(runs), "--work_dir", str(tmp_path)]
    command += ["--model_path", "models/chatglm2-tiny", "--train_data_path", "data/dev.jsonl"]
    command += ["--results_dir", str(tmp_path / "results")]
    done = subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results").glob("train_chatglm2-6b_*.json")
    found = json.loads(path.read_text())["runs"]
    assert list(found) == runs
    assert all(result.get("tokens_per_second", 0) > 0 for result in found.values()), found


def test_an_unknown_run_is_refused():
    command = [sys.executable, "benchmarks/bench_train_step.py", "--model_path", "models/chatglm2-tiny", "--runs", "x"]
    done = subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--runs x: expected of shipped, " in done.stderr
