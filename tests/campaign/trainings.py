"""Small trainings that campaigns interrupt: their configurations, data, commands and uninterrupted results."""

import json
import random
import re
from pathlib import Path

from tests.campaign.harness import once
from tests.campaign.processes import run
from tests.conftest import FIXTURES_DIR

ADAPTER = "adapter_model.safetensors"
COMMON = {
    "output_dir": "out",
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "steps",
}
BEST = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "per_device_eval_batch_size": 4}
TRAININGS = {  # by name: family, keys of the JSON file, flags
    "a save at every step": ("chatglm2-6b", {"max_steps": 9, "save_steps": 1}, {}),
    "best model, one checkpoint kept": (
        "chatglm-6b",
        # the first evaluation is the best one, so that the kept checkpoint is not the last one
        {"max_steps": 10, "save_steps": 2, "save_total_limit": 1, **BEST},
        {"lora_dropout": 0.1},
    ),
    "padded, workers": (
        "chatglm2-6b",
        {"max_steps": 9, "save_steps": 3, "dataloader_num_workers": 2, "save_total_limit": 1},
        {"packing": False},
    ),
    "by epoch, accumulated": (
        "chatglm-6b",
        {
            "num_train_epochs": 3,
            "save_strategy": "epoch",
            "gradient_accumulation_steps": 2,
            "train_sampling_strategy": "group_by_length",
        },
        {"lora_targets": "all-linear", "lora_dropout": 0.2},
    ),
    "adafactor, two kept": (
        "chatglm2-6b",
        {"max_steps": 12, "save_steps": 2, "save_total_limit": 2, "optim": "adafactor", **BEST},
        {},
    ),
}


def write_rows(path: Path, number: int, name: str) -> None:
    """Write examples of different lengths, the same for each campaign."""
    rng = random.Random(name)
    rows = []
    for _ in range(number):
        words = ["".join(rng.choices("白黑红蓝绿上衣裤子裙百搭时尚风格", k=rng.randint(1, 12))) for _ in range(2)]
        rows.append({"content": f"类型#{words[0]}", "summary": words[1]})
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def prepare(directory: Path, name: str, **changes: object) -> list[str]:
    """Write the input files of a training into a directory and return the words of its command."""
    directory.mkdir(parents=True, exist_ok=True)
    family, args, flags = TRAININGS[name]
    write_rows(directory / "train.jsonl", 14, "train")
    write_rows(directory / "dev.jsonl", 4, "dev")
    (directory / "args.json").write_text(json.dumps({**COMMON, **args, **changes}))
    flags = {
        "model_name_or_path": FIXTURES_DIR / family / "model",
        "train_args_json": "args.json",
        "train_data_path": "train.jsonl",
        "resume_from_checkpoint": "auto",
        **({"eval_data_path": "dev.jsonl"} if "eval_steps" in args else {}),
        **flags,
    }
    return ["train_qlora.py", *(f"--{key}={value}" for key, value in flags.items())]


def reference(shared_dir: Path, name: str) -> Path:
    """Return the directory of the uninterrupted training of a configuration, computed once."""

    def make(directory: Path) -> None:
        code, log_path = run(prepare(directory, name), directory)
        assert code == 0, log_path.read_text("utf-8")[-3000:]

    return once(shared_dir / f"training {name}", make)


def steps_logged(text: str) -> list[int]:
    """Return the steps whose losses a log reports."""
    return [int(step) for step in re.findall(r"step (\d+)/\d+: loss", text)]


def checkpoint_steps(output_dir: Path) -> list[int]:
    """Return the steps of the checkpoints in an output directory."""
    found = [re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output_dir.glob("checkpoint-*")]
    return sorted(int(match[1]) for match in found if match)
