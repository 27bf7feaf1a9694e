"""The loop over learning rates in docs/training.md runs as it is written there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from glm_utils.family import PROJECT_DIR
from tests.test_checkpoints import ARGS, EXAMPLES, MODEL_DIR


@pytest.mark.slow
def test_the_sweep_of_the_documentation(tmp_path):
    """Only model, data and rates are smaller."""
    blocks = re.findall(r"```bash\n(.*?)```", (PROJECT_DIR / "docs/training.md").read_text("utf-8"), re.S)
    (loop,) = [block for block in blocks if "for rate in" in block]
    settings = {**ARGS, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "output_dir": "replaced"}
    for name, content in (("chatGLM2_6B_QLoRA.json", settings), ("data/train.jsonl", None), ("data/dev.jsonl", None)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content or EXAMPLES[:6], ensure_ascii=False), "utf-8")
    for given, smaller in (
        ("for rate in 1e-4 3e-4 1e-3", "for rate in 1e-2 1e-4"),
        ("THUDM/chatglm2-6b", str(MODEL_DIR)),
        ("python train_qlora.py", f"python {PROJECT_DIR / 'train_qlora.py'}"),
    ):
        assert given in loop
        loop = loop.replace(given, smaller)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(["bash", "-ec", loop], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    header, line, *rows = done.stdout.splitlines()[-4:]  # behind what the trainings say about their data
    assert (header, line) == ("| run | eval_loss | step |", "|---|---|---|")
    found = {row.split(" | ")[0].removeprefix("| "): float(row.split(" | ")[1]) for row in rows}
    assert found.keys() == {"sweep_1e-2", "sweep_1e-4"}
    assert list(found.values()) == sorted(found.values())
    for name, loss in found.items():
        record = json.loads((tmp_path / "saved_files" / name / "run_config.json").read_text("utf-8"))
        assert record["training_args"]["learning_rate"] == float(name.removeprefix("sweep_"))
        results = json.loads((tmp_path / "saved_files" / name / "all_results.json").read_text("utf-8"))
        assert loss == pytest.approx(results["eval_loss"], abs=1e-4)
