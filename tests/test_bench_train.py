"""The training benchmark from end to end on a tiny model: a shipped run, a plain loop and the stock yardstick."""

import json
import subprocess
import sys

import pytest

from benchmarks.harness.results import device_name
from glm_utils.family import PROJECT_DIR
from glm_utils.files import write_json

BENCHMARK = [sys.executable, "-m", "benchmarks.bench_train_step", "--model_path", "models/chatglm2-tiny"]


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    runs = ["recipe-rows", "loop-4bit", "stock-recipe"]
    command = [*BENCHMARK, "--runs", ",".join(runs), "--work_dir", str(tmp_path)]
    command += ["--train_data_path", "data/dev.jsonl"]
    command += ["--results_dir", str(tmp_path / "results")]
    (tmp_path / "results").mkdir()
    earlier = {"runs": {"shipped": {"tokens_per_second": 1.0}}}
    path = tmp_path / "results" / f"train_chatglm2-6b_{device_name()}.json"
    write_json(path, {"benchmark": "train_step", "family": "chatglm2-6b", "starts": [earlier]})
    done = subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kept, added = json.loads(path.read_text())["starts"]
    assert kept == earlier
    assert list(added["runs"]) == runs
    assert all(result.get("tokens_per_second", 0) > 0 for result in added["runs"].values()), added


def test_an_unknown_run_is_refused():
    done = subprocess.run([*BENCHMARK, "--runs", "x"], cwd=PROJECT_DIR, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--runs x: expected some of shipped, " in done.stderr
