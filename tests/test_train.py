"""train_qlora.py from end to end on the golden models: output, resume, and every refusal before training."""

import dataclasses
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

import train_qlora as stage
from glm_utils.checkpoint import load_tokenizer_class, open_checkpoint
from glm_utils.cli import UserError, run_cli
from glm_utils.data.training_data import read_training_data
from glm_utils.evaluation import at_end
from glm_utils.family import FAMILIES, PROJECT_DIR
from glm_utils.load_model import load_adapter, load_base_model
from glm_utils.training import inputs, lora_flags, preflight, resume, run, settings
from glm_utils.training.inputs import read_inputs
from glm_utils.training.lora_flags import DEFAULTS
from glm_utils.training.manifest import write_manifest
from glm_utils.training.shipped_args import shipped_args
from glm_utils.training.training_args import read_train_args
from tests.conftest import write_quantized

COLORS, CLOTHES = "白黑红蓝绿", ("上衣", "裤子", "裙子")
EXAMPLES = [
    {"content": f"类型#{kind}*颜色#{color}色", "summary": f"{color}色的{kind}，百搭又时尚。"}
    for kind in CLOTHES
    for color in COLORS
]
ARGS = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_steps": 2,
    "warmup_steps": 0.25,
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture
def train_path(write, tmp_path, monkeypatch):
    """A data file; the working directory is the test's own."""
    monkeypatch.chdir(tmp_path)
    return write("train.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in EXAMPLES))


@pytest.fixture
def train(write, train_path, model_dir, tmp_path):
    """Run the stage on the test's data; JSON keys in `args`, flags as keywords. Returns the output directory."""

    def run(name="out", args=None, **flags):
        values = {**ARGS, "output_dir": str(tmp_path / name), **(args or {})}
        path = write("args.json", {key: value for key, value in values.items() if value is not None})
        flags = {"train_args_json": str(path), "train_data_path": str(train_path), **flags}
        stage.train_qlora(**{"model_name_or_path": str(model_dir), **flags})
        return tmp_path / name

    return run


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(Trainer, "train", lambda *args, **kwargs: pytest.fail("training started"))


def adapter_state(path):
    return load_file(path / "adapter_model.safetensors")


def assert_same_bits(first, second):
    first, second = adapter_state(first), adapter_state(second)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


# ---- the whole run


@pytest.mark.slow
def test_evaluation_behind_a_training(train, write, tmp_path, log_lines):
    """--evaluate_after leaves a report whose loss after training is the training's eval_loss."""
    eval_path = write("dev.json", EXAMPLES[:4])
    base_dir = str(PROJECT_DIR / "models/chatglm2-tiny")
    args = {"eval_strategy": "steps", "eval_steps": 4, "use_cpu": True}
    out = train(args=args, eval_data_path=str(eval_path), model_name_or_path=base_dir, evaluate_after=True)
    report = json.loads((tmp_path / "out_evaluation/report.json").read_text("utf-8"))
    metrics = json.loads((out / "all_results.json").read_text("utf-8"))
    assert report["figures"]["loss"]["after"] == pytest.approx(metrics["eval_loss"], rel=1e-4)
    assert report["figures"]["loss"]["before"] > report["figures"]["loss"]["after"]
    assert report["num_probe_questions"] == 160
    assert any(report["verdict"] in line for line in log_lines)


def test_evaluation_behind_a_training_is_checked_before_it(train, no_training, tmp_path, write):
    with pytest.raises(UserError, match="--evaluate_after true: no evaluation data"):
        train(args={"eval_strategy": "no"}, evaluate_after=True)
    write("out_evaluation/notes.txt", "mine")
    with pytest.raises(UserError, match="out_evaluation: not empty"):
        train(eval_data_path=str(write("dev.json", EXAMPLES[:4])), evaluate_after=True)


def test_whole_run(train, write, family, model_dir, log_lines):
    eval_path = write("dev.json", EXAMPLES[:4])
    args = {"eval_strategy": "steps", "eval_steps": 2, "report_to": "tensorboard"}
    out = train(args=args, eval_data_path=str(eval_path), lora_dropout=0.0)
    tokenizer_files = {"tokenizer_config.json", family.tokenizer_file}
    results = {"train_results.json", "eval_results.json", "all_results.json", "trainer_state.json"}
    results |= {"training_loss.png", "eval_loss.png"}
    adapter = {"adapter_config.json", "adapter_model.safetensors", "README.md", "run_config.json"}
    found = {path.name for path in out.iterdir()} - {"chat_template.jinja", "special_tokens_map.json"}
    assert found == tokenizer_files | results | adapter | {"checkpoint-2", "checkpoint-4", "runs"}
    assert list(out.glob("runs/*/events.out.tfevents.*"))

    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model_dir)
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 32, ["query_key_value"])
    metrics = json.loads((out / "all_results.json").read_text())
    assert {"train_loss", "eval_loss", "train_runtime", "epoch"} <= metrics.keys()
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    eval_losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(eval_losses) == 2  # the last one is not made twice
    assert eval_losses[-1] < eval_losses[0]
    assert metrics["eval_loss"] == pytest.approx(eval_losses[-1])
    saved_tokenizer = load_tokenizer_class(family).from_pretrained(out)
    assert saved_tokenizer.encode_prompt("你好") == open_checkpoint(model_dir).tokenizer.encode_prompt("你好")
    check_model(out, model_dir)
    check_record(out, family)
    check_log(log_lines)


def check_model(out, model_dir):
    ids = torch.tensor([open_checkpoint(model_dir).tokenizer.encode_prompt("类型#上衣*颜色#白色")])
    base = load_base_model(open_checkpoint(model_dir)).eval()
    with torch.no_grad():
        before = base(input_ids=ids).logits.clone()
        after = load_adapter(base, out).eval()(input_ids=ids).logits
    assert not torch.allclose(before, after, atol=1e-3)
    state = adapter_state(out)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all("query_key_value" in key for key in state)


def check_record(out, family):
    record = json.loads((out / "run_config.json").read_text())
    assert record["stage"] == "train_qlora"
    assert record["base"]["family"] == family.name
    assert record["arguments"]["lora_dropout"] == 0.0
    assert record["arguments"]["max_input_length"] == 512
    assert record["training_args"]["max_steps"] == 4
    assert record["data"]["train"]["num_rows"] == len(EXAMPLES)
    assert {"torch", "transformers", "peft", "bitsandbytes", "python", "device"} <= record["versions"].keys()
    assert "commit" in record
    assert {**json.loads((out / "checkpoint-2" / "run_config.json").read_text()), "kept_step": 4} == record
    card = (out / "README.md").read_text()
    metrics = json.loads((out / "all_results.json").read_text())
    for text in ("base_model:", "train.jsonl, 15 examples", "lora_rank | 4", "learning_rate | 0.01"):
        assert text in card
    assert f"eval_loss | {metrics['eval_loss']:.4f}" in card
    assert f"train_loss | {metrics['train_loss']:.4f}" in card


def check_log(log_lines):
    text = "\n".join(log_lines)
    assert re.search(r"first example, trained part in \[\[ \]\]: .*\[\[ .*百.*\]\]", text)
    assert re.search(r"train: 15 examples, [\d,]+ tokens \(\d+ trained\), \d+ in the longest example", text)
    assert re.search(r"step 2/4: loss .* left", text)
    assert "SUCCESS adapter written to" in text


def test_rank_4_at_6b_size_stays_a_few_megabytes(family):
    shapes = json.loads((PROJECT_DIR / "tests/fixtures" / family.name / "state_dict_6b.json").read_text())
    shapes = shapes.get("keys", shapes.get("shapes", shapes))
    items = shapes.items() if isinstance(shapes, dict) else [(entry["key"], entry["shape"]) for entry in shapes]
    linear = [shape for key, shape in items if key.endswith("query_key_value.weight")]
    assert len(linear) == 28
    assert sum(4 * 4 * (num_out + num_in) for num_out, num_in in linear) < 8e6  # rank 4, fp32, bytes


@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
def test_all_linear_with_both_dtypes(train, family, compute_dtype):
    out = train(args={"max_steps": 1, "save_strategy": "no"}, compute_dtype=compute_dtype, lora_targets="all-linear")
    config = json.loads((out / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(family.linear_names)
    state = adapter_state(out)
    assert {key.split(".lora_")[0].rsplit(".", 1)[1] for key in state} == set(family.linear_names)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_fp16_compute_on_a_cpu_warns_and_works(train, log_lines):
    train(args={"max_steps": 1, "save_strategy": "no"}, compute_dtype="fp16")
    assert any("slower than bf16 or fp32 on a CPU" in line for line in log_lines)


def test_the_other_familys_json(train, no_training, write, family, model_dir, train_path, log_lines):
    other = next(known for known in FAMILIES if known is not family)
    copy = json.loads((PROJECT_DIR / other.train_args_json).read_text())
    flags = {"train_data_path": str(train_path), "model_name_or_path": str(model_dir)}
    path = write(other.train_args_json, {**copy, "output_dir": "mine", "eval_strategy": "no"})
    arguments = {name: flag.default for name, flag in inspect.signature(stage.train_qlora).parameters.items()} | flags
    with pytest.raises(UserError, match=f"{other.train_args_json}: ships for {other.title}, but the base"):
        read_inputs({**arguments, "train_args_json": str(path)})
    # of a hub id that is none of the published ones, the family is known when config.json has come
    found = dataclasses.replace(read_inputs(arguments), family=None, args_file=read_train_args(path))
    with pytest.raises(UserError, match=f"ships for {other.title}, but the base {model_dir} is {family.title}"):
        settings.resolve_settings(found)
    own = write("mine.json", {**copy, "eval_strategy": "no"})
    read_inputs({**arguments, "train_args_json": str(own)})  # a copy is the user's; its output_dir is named
    assert any(f"output_dir is {copy['output_dir']}, named after {other.title}" in line for line in log_lines)


def test_what_was_left_out_is_named(model_dir, train_path, family, log_lines, monkeypatch):
    monkeypatch.setattr(lora_flags, "check_model_dir", lambda name: None)
    flags = SimpleNamespace(model_name_or_path="THUDM/chatglm2-6b", init_lora_path=None, prompt_text="")
    inputs.check_base({"model_name_or_path": None}, flags, None)
    assert any("base model: THUDM/chatglm2-6b, the default of --model_name_or_path" in line for line in log_lines)
    file = shipped_args(family)
    assert file.path.name == family.train_args_json
    assert any(
        f"no --train_args_json: taking {file.path}, which ships for {family.title}" in line for line in log_lines
    )


def test_prompt_text_reaches_the_ids_and_the_record(train, log_lines):
    out = train(args={"max_steps": 1, "save_strategy": "no"}, prompt_text="百搭")
    assert json.loads((out / "run_config.json").read_text())["identity"]["prompt_text"] == "百搭"
    sample = next(line for line in log_lines if "first example" in line)
    prompt, trained = sample.removeprefix("INFO first example, trained part in [[ ]]: ").split("[[")
    assert "百 搭" in prompt.replace("百搭", "百 搭")
    assert prompt.replace(" ", "").index("百搭") < prompt.replace(" ", "").index("类型")


def test_gradient_accumulation_gives_the_gradient_of_the_full_batch(train):
    args = {"max_steps": 1, "save_strategy": "no", "optim": "sgd", "max_grad_norm": 1e9, "warmup_steps": 0}
    outs = []
    for batch_size, num_parts in ((8, 1), (2, 4)):
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": num_parts}
        outs.append(train(f"parts-{num_parts}", args={**args, **sizes}, lora_dropout=0.0))
    first, second = map(adapter_state, outs)
    moved = [key for key in first if "lora_B" in key]
    assert all(first[key].abs().max() > 0 for key in moved)
    assert all(torch.allclose(first[key], second[key], rtol=1e-3, atol=1e-7) for key in first)


def test_checkpointing_changes_nothing_but_memory(train):
    args = {"max_steps": 2, "save_strategy": "no"}
    on = train("on", args={**args, "gradient_checkpointing": True})
    off = train("off", args={**args, "gradient_checkpointing": False})
    first, second = adapter_state(on), adapter_state(off)
    assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)


def test_the_seed_decides_everything(train):
    args = {"max_steps": 2, "save_strategy": "no"}
    first, again, other = train("a", args=args, seed=7), train("b", args={**args, "seed": 7}), train("c", args=args)
    assert_same_bits(first, again)
    assert not torch.equal(*(next(iter(adapter_state(path).values())) for path in (first, other)))


def test_the_evaluation_loss_is_the_mean_over_all_trained_tokens(train, write, model_dir):
    """Answers of 1 to 40 characters: neither batches nor packing may change how much a token counts."""
    examples = [{"content": "类型#上衣", "summary": "百搭又时尚，" * size} for size in (1, 7, 2, 5, 1)]
    eval_path = str(write("dev.json", examples))
    tokenizer, losses = open_checkpoint(model_dir).tokenizer, []
    args = {"max_steps": 1, "save_strategy": "no", "learning_rate": 0.0}
    for size, packing in ((1, True), (2, True), (2, False), (8, True)):
        sizes = {"per_device_eval_batch_size": size}
        out = train(f"{size}-{packing}", {**args, **sizes}, packing=packing, eval_data_path=eval_path)
        losses.append(json.loads((out / "eval_results.json").read_text())["eval_loss"])
    model = load_base_model(open_checkpoint(model_dir), load_in_4bit=True).eval()
    total, num_tokens = 0, 0
    for example in examples:
        prompt, answer = tokenizer.encode_prompt(example["content"], []), tokenizer.encode_answer(example["summary"])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            total += model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss.item() * len(answer)
        num_tokens += len(answer)
    assert losses == pytest.approx([total / num_tokens] * 4, rel=1e-5)


TRAIN_AND_LIST_THREADS = f"""
import pathlib, sys
sys.path.insert(0, {str(PROJECT_DIR)!r})
import train_qlora
train_qlora.run_cli(train_qlora.train_qlora)
names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
assert not any("gloo" in name for name in names), f"threads that can abort the exit: {{names}}"
"""


def run_two_processes(write, flags):
    """Run the stage in two processes on the CPU; they leave without threads of their group. Returns the log."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(write("two.py", TRAIN_AND_LIST_THREADS)), *(f"--{name}={value}" for name, value in flags.items())]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_two_processes_leave_after_a_dry_run(write, train_path, model_dir, tmp_path):
    path = write("two.json", {**ARGS, "use_cpu": True, "output_dir": str(tmp_path / "two")})
    flags = {"train_args_json": path, "train_data_path": train_path, "model_name_or_path": model_dir}
    assert "per step: 8 examples" in run_two_processes(write, {**flags, "dry_run": True})
    assert not (tmp_path / "two").exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_two_processes_train_as_one_with_twice_the_batch(train, write, train_path, model_dir, tmp_path, strategy):
    eval_path = str(write("dev.json", EXAMPLES[:8]))
    args = {"max_steps": 3, "save_strategy": "no", "optim": "sgd", "max_grad_norm": 1e9, "warmup_steps": 0}
    args |= {"gradient_accumulation_steps": 1, "train_sampling_strategy": strategy, "use_cpu": True}
    one = train("one", {**args, "per_device_train_batch_size": 4}, lora_dropout=0.0, eval_data_path=eval_path)
    path = write("two.json", {**ARGS, **args, "per_device_train_batch_size": 2, "output_dir": str(tmp_path / "two")})
    flags = {"train_args_json": path, "train_data_path": train_path, "eval_data_path": eval_path}
    flags |= {"model_name_or_path": model_dir, "lora_dropout": 0}
    assert "find_unused_parameters" not in run_two_processes(write, flags)
    first, second = adapter_state(one), adapter_state(tmp_path / "two")
    assert any(first[key].abs().max() > 1e-3 for key in first if "lora_B" in key)
    assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)
    losses = [json.loads((out / "eval_results.json").read_text())["eval_loss"] for out in (one, tmp_path / "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_the_last_line_names_the_loss_of_the_adapter_that_is_kept(train, write, log_lines):
    """With load_best_model_at_end that of the best step; a learning rate that is too high makes the last one worse."""
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 4}
    args = {**steps, "load_best_model_at_end": True, "learning_rate": 3.0, "warmup_steps": 0, "optim": "sgd"}
    args |= {"lr_scheduler_type": "constant"}
    out = train(args=args, eval_data_path=str(write("dev.json", EXAMPLES[:4])))
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["best_global_step"] < 4
    best = out / f"checkpoint-{state['best_global_step']}"
    assert_same_bits(out, best)
    line = next(line for line in log_lines if "adapter written" in line)
    assert f"eval_loss {state['best_metric']:.4f}" in line


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_a_step_has_no_more_examples_than_the_data(train, write, log_lines):
    rows = "".join(json.dumps(row) + "\n" for row in EXAMPLES[:3])
    args = {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 4}
    train(args=args, train_data_path=str(write("three.jsonl", rows)), dry_run=True)
    num_tokens = next(line for line in log_lines if "train: 3 examples" in line).split(", ")[1].split()[0]
    assert any(f"per step: 3 examples, about {num_tokens} tokens" in line for line in log_lines)


@pytest.mark.parametrize("args", [{"learning_rate": -1}, {"lr_scheduler_type": "cosine_with_min_lr"}])
def test_a_dry_run_refuses_what_a_run_would(train, args):
    with pytest.raises(UserError, match=f"args.json:1: {next(iter(args))} "):
        train(args=args, dry_run=True)


# ---- shipped and old TrainingArguments


@pytest.mark.parametrize("name", ["shipped", "2023"])
def test_shipped_and_old_files_run(train_path, write, family, model_dir, name, tmp_path, monkeypatch):
    shipped = PROJECT_DIR / (family.train_args_json if name == "shipped" else "tests/fixtures/train_args_2023.json")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")
    eval_path = write("dev.jsonl", json.dumps(EXAMPLES[0]))
    stage.train_qlora(
        train_args_json=str(shipped),
        model_name_or_path=str(model_dir),
        train_data_path=str(train_path),
        eval_data_path=str(eval_path),
    )
    (out,) = (tmp_path / "saved_files").iterdir()
    assert (out / "adapter_model.safetensors").is_file()
    logs = "logs/events.out*" if name == "2023" else "runs/*/events.out*"
    assert list(out.glob(logs))


@pytest.mark.parametrize(
    "when",
    [
        {"logging_steps": 1},
        {"logging_steps": 3, "save_steps": 1},
        {"logging_strategy": "no", "save_strategy": "epoch"},
        {"logging_strategy": "no", "save_strategy": "no"},
    ],
    ids=["at a log", "before a checkpoint", "before that of an epoch", "at the end"],
)
@pytest.mark.parametrize("hides", [False, True])
def test_nan_weights_end_the_run(train, tmp_path, when, hides):
    """The error says what to change; no checkpoint and no adapter holds them, even if the file hides NaN losses."""
    args = {"learning_rate": 1e30, "max_grad_norm": 0, "warmup_steps": 0, "max_steps": 4, "optim": "sgd", **when}
    with pytest.raises(
        UserError, match=r"step \d: the trained weights are NaN or infinite.*learning_rate \(now 1e\+30"
    ):
        train("nan", args={**args, "logging_nan_inf_filter": hides})
    kept = [load_file(path) for path in tmp_path.glob("nan/**/adapter_model.safetensors")]
    assert all(weight.isfinite().all() for adapter in kept for weight in adapter.values())
    assert len(kept) == ("save_steps" in when)
    assert not (tmp_path / "nan" / "adapter_config.json").exists()


# ---- resume


@pytest.mark.parametrize(
    "more",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": False},
        {"train_sampling_strategy": "group_by_length"},
    ],
    ids=str,
)
def test_a_resumed_run_ends_with_the_same_bits(train, write, more):
    """7 steps of 2 x 2 examples over 15: the checkpoint lies in the second epoch; dropout and evaluation are on.

    Only the first run logs sample answers, which must not change it.
    """
    args = {"max_steps": 7, "save_steps": 5, "eval_strategy": "steps", "eval_steps": 2, **more}
    eval_path = str(write("dev.jsonl", json.dumps(EXAMPLES[0])))
    flags = {"eval_data_path": eval_path, "lora_dropout": 0.1}
    complete = train("complete", args={**args, "report_to": "tensorboard"}, log_samples=1, **flags)
    shutil.copytree(complete / "checkpoint-5", complete.parent / "resumed" / "checkpoint-5")
    assert not torch.equal(
        *(next(iter(adapter_state(path).values())) for path in (complete, complete / "checkpoint-5"))
    )
    resumed = train("resumed", args=args, resume_from_checkpoint="latest", **flags)
    assert_same_bits(complete, resumed)
    assert logged_losses(complete) == logged_losses(resumed)


def logged_losses(out):
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def test_a_run_resumes_with_smaller_batches_of_the_same_step(train):
    """As the out-of-memory message says; examples, order and gradients stay the same."""
    args = {"max_steps": 6, "save_steps": 3}  # of 15 examples, 4 per step: the checkpoint lies inside the first epoch
    complete = train("complete", args=args, lora_dropout=0.0)
    shutil.copytree(complete / "checkpoint-3", complete.parent / "resumed" / "checkpoint-3")
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    resumed = train("resumed", args={**args, **parts}, lora_dropout=0.0, resume_from_checkpoint="latest")
    first, second, before = map(adapter_state, (complete, resumed, complete / "checkpoint-3"))
    assert all((first[key] - second[key]).abs().max() < 1e-3 * (first[key] - before[key]).abs().max() for key in first)


@pytest.fixture
def checkpoint(train):
    return train(args={"max_steps": 2, "save_steps": 1}) / "checkpoint-1"


@pytest.mark.parametrize("form", ["path", "output_dir", "true"])
@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_ways_to_name_the_checkpoint(train, checkpoint, monkeypatch, form):
    given = {}
    monkeypatch.setattr(run, "run_trainer", lambda trainer, path: given.update(path=path) or {})
    monkeypatch.setattr(run, "save_adapter", lambda *args: None)
    out = checkpoint.parent
    value = {"path": str(checkpoint), "output_dir": str(out), "true": True}[form]
    train(args={"max_steps": 3, "save_steps": 1}, resume_from_checkpoint=value)
    assert given["path"] == (checkpoint if form == "path" else out / "checkpoint-2")


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
@pytest.mark.parametrize(
    ("args", "flags", "message"),
    [
        ({}, {"lora_rank": 8}, "lora_rank is 4 in the checkpoint and 8 now"),
        ({}, {"lora_alpha": 16}, "lora_alpha is 32 in the checkpoint and 16 now"),
        ({}, {"lora_targets": "all-linear"}, "lora_targets is"),
        ({}, {"seed": 1}, "seed is 42 in the checkpoint and 1 now"),
        ({}, {"prompt_text": "a"}, "prompt_text is"),
        ({}, {"max_input_length": 100}, "max_input_length is 512 in the checkpoint and 100 now"),
        ({}, {"truncated_answers": "cut"}, 'truncated_answers is "cut_and_end" in the checkpoint and "cut" now'),
        ({}, {"loss_on": "all"}, 'loss_on is "last" in the checkpoint and "all" now'),
        ({"per_device_train_batch_size": 1}, {}, "rows_per_step is 4 in the checkpoint and 2 now"),
        ({"dataloader_drop_last": True}, {}, "dataloader_drop_last is false in the checkpoint and true now"),
    ],
)
def test_resume_into_another_run_is_refused(train, checkpoint, no_training, args, flags, message):
    with pytest.raises(UserError) as error_info:
        train(args=args, resume_from_checkpoint=str(checkpoint), **flags)
    assert str(error_info.value).startswith(str(checkpoint))
    assert message in str(error_info.value)


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_a_checkpoint_of_before_a_flag_has_its_default(train, checkpoint):
    path = checkpoint / "run_config.json"
    record = json.loads(path.read_text("utf-8"))
    for name in settings.IDENTITY_DEFAULTS:
        del record["identity"][name]
        record["arguments"].pop(name, None)
    path.write_text(json.dumps(record), "utf-8")
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)
    with pytest.raises(UserError, match='loss_on is "last" in the checkpoint and "all" now'):
        train(resume_from_checkpoint=str(checkpoint), loss_on="all")
    train(args={"max_steps": 2, "save_steps": 1}, resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_a_run_with_examples_left_out_is_finished_when_the_others_are_trained(train, write, log_lines, monkeypatch):
    """Steps are counted without them: a run that is done is not done again, and one that is not goes on."""
    rows = [{**row, "summary": row["summary"] * (9 if number % 2 else 1)} for number, row in enumerate(EXAMPLES)]
    flags = {"truncated_answers": "drop", "max_output_length": 40, "resume_from_checkpoint": "auto"}
    flags["train_data_path"] = str(write("long.json", rows))
    args = {"max_steps": -1, "num_train_epochs": 2, "save_steps": 1}
    out = train(args=args, **flags)
    record = json.loads((out / "run_config.json").read_text("utf-8"))["data"]["train"]
    assert (record["num_rows"], record["num_dropped"]) == (8, 7)
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 4
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", lambda *args, **kwargs: pytest.fail("training started"))
        train(args=args, **flags)
    assert any("finished already, 4 steps are done" in line for line in log_lines)
    train(args={**args, "num_train_epochs": 3}, **flags)
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 6


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_resume_on_other_data_or_another_base_is_refused(train, checkpoint, write, no_training, tmp_path):
    other = write("other.jsonl", json.dumps(EXAMPLES[0]))
    with pytest.raises(UserError, match="train_data_sha256"):
        train(resume_from_checkpoint=str(checkpoint), train_data_path=str(other))
    model_dir = PROJECT_DIR / "tests/fixtures/chatglm-6b/model"
    with pytest.raises(UserError, match="base_fingerprint"):
        train(resume_from_checkpoint=str(checkpoint), model_name_or_path=str(model_dir))


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
@pytest.mark.parametrize(
    "length", [{"max_steps": 4}, {"max_steps": -1, "num_train_epochs": 1}]
)  # 15 examples, 4 per step
def test_a_finished_run_is_not_trained_further(train, length):
    """Resumed at its last step, the Trainer would take one more."""
    out = train(args=length)
    before = adapter_state(out)
    with pytest.raises(UserError, match=r"checkpoint-4: all 4 steps are done. Use it as it is \(--lora_path "):
        train(args=length, resume_from_checkpoint="latest")
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapter_state(out).items())


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_a_checkpoint_without_a_record_of_its_run_is_refused(train, checkpoint, no_training):
    (checkpoint / "run_config.json").unlink()
    with pytest.raises(UserError, match="run_config.json missing, so nothing says which run it belongs to"):
        train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_a_path_without_a_complete_checkpoint_is_an_error(train, checkpoint, no_training, tmp_path):
    for value in (str(tmp_path), str(tmp_path / "nothing"), "latest", True):
        with pytest.raises(UserError, match="no checkpoint-N in"):
            train("fresh", resume_from_checkpoint=value)
    with pytest.raises(UserError, match="checkpoint-99: no such directory"):
        train(resume_from_checkpoint=str(checkpoint.parent / "checkpoint-99"))
    for data in ((checkpoint / "optimizer.pt").read_bytes()[:-100], None):
        (checkpoint / "optimizer.pt").write_bytes(data) if data else (checkpoint / "optimizer.pt").unlink()
        with pytest.raises(UserError, match=r"not a complete checkpoint, optimizer.pt missing or truncated"):
            train(resume_from_checkpoint=str(checkpoint))


# ---- refusals


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_an_earlier_run_is_kept_unless_the_file_says_otherwise(train, checkpoint, log_lines, monkeypatch):
    out = checkpoint.parent
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(UserError, match=r"holds an earlier run.*--resume_from_checkpoint latest"):
        train(args={"max_steps": 1})
    assert sorted(path.name for path in out.iterdir()) == before
    train(args={"max_steps": 1, "overwrite_output_dir": True})
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_a_setting_that_the_trainer_refuses_costs_nothing(train, checkpoint, monkeypatch):
    out = checkpoint.parent
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    monkeypatch.setattr(Trainer, "create_optimizer", lambda *args: pytest.fail("refused"))
    with pytest.raises(pytest.fail.Exception, match="refused"):
        train(args={"overwrite_output_dir": True})
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert checkpoint.is_dir()


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_an_output_dir_in_the_home_directory_is_as_safe(train, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    train(args={"max_steps": 1, "save_steps": 1, "output_dir": "~/run"})
    with pytest.raises(UserError, match="holds an earlier run"):
        train(args={"max_steps": 2, "output_dir": "~/run"})
    train(args={"max_steps": 2, "output_dir": "~/run"}, resume_from_checkpoint="latest")
    assert json.loads((tmp_path / "run/trainer_state.json").read_text())["global_step"] == 2


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_going_on_from_elsewhere_keeps_an_earlier_run(train, checkpoint):
    """Also a run that goes on from another directory's checkpoint needs a free output_dir, and writes all of it."""
    other = train("other", args={"max_steps": 1, "save_steps": 1})
    before = (other / "adapter_model.safetensors").read_bytes()
    with pytest.raises(UserError, match="other: output_dir holds an earlier run"):
        train("other", resume_from_checkpoint=str(checkpoint))
    assert (other / "adapter_model.safetensors").read_bytes() == before
    for name, more in (("other", {"overwrite_output_dir": True}), ("free", {})):
        out = train(name, args={"max_steps": 2, "save_steps": 2, **more}, resume_from_checkpoint=str(checkpoint))
        assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
        assert_same_bits(out, checkpoint.parent)
    assert checkpoint.is_dir()


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
@pytest.mark.parametrize("name", ["config.json", "README.md"])
def test_what_is_not_a_run_is_not_replaced(train, no_training, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(UserError, match=rf"holds {name}, which no run of this script wrote"):
        train(args={"overwrite_output_dir": True})
    assert (tmp_path / "out" / name).read_text() == "mine"


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_results_are_those_of_the_run_that_is_there(train, write):
    eval_path = write("dev.json", EXAMPLES[:4])
    train(args={"max_steps": 1}, eval_data_path=str(eval_path))
    out = train(args={"max_steps": 1, "overwrite_output_dir": True})
    assert not (out / "eval_results.json").exists()
    assert "eval_loss" not in json.loads((out / "all_results.json").read_text())


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_the_preflight_takes_no_more_examples_than_a_batch(train, monkeypatch):
    tokens = []
    real = preflight.make_plan
    monkeypatch.setattr(
        preflight, "make_plan", lambda *args: tokens.append(args[1]["input_ids"].numel()) or real(*args)
    )
    for size in (1, 2):
        train(args={"per_device_train_batch_size": size}, dry_run=True)
    assert tokens[0] * 2 == pytest.approx(tokens[1], abs=4)


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")]
)
def test_out_of_memory_before_training_says_what_to_change(train, monkeypatch, error):
    def make_plan(*args):
        raise error

    monkeypatch.setattr(preflight, "make_plan", make_plan)
    with pytest.raises(UserError, match="out of memory in the preflight.*halve per_device_train_batch_size"):
        train()


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
@pytest.mark.parametrize(
    ("args", "flags", "message"),
    [
        ({}, {"train_data_path": "none.jsonl"}, "none.jsonl: no such file"),
        ({}, {"train_args_json": "none.json"}, "none.json: no such file"),
        ({}, {"model_name_or_path": "/none"}, "/none: no such directory"),
        ({}, {"lora_targets": "q_proj"}, "no module 'q_proj'"),
        ({}, {"lora_rank": 0}, "--lora_rank=0"),
        ({}, {"lora_alpha": -1}, "--lora_alpha=-1"),
        ({}, {"lora_dropout": 1.0}, "--lora_dropout=1.0"),
        ({}, {"max_input_length": 0}, "--max_input_length=0"),
        ({}, {"max_output_length": 1}, "--max_output_length=1"),
        ({"eval_strategy": "steps"}, {}, "Give --eval_data_path"),
        ({"fp16": True}, {}, "fp16 needs a GPU"),
        ({"bf16": True}, {"compute_dtype": "fp16"}, "--compute_dtype fp16 contradicts bf16"),
        ({"neftune_noise_alpha": 5.0}, {}, "Give --packing=false"),
        ({"learning_rte": 1}, {}, "Did you mean learning_rate?"),
        ({"learning_rate": "fast"}, {}, 'learning_rate is "fast", expected float'),
        ({"output_dir": "train.jsonl"}, {}, "output_dir is a file"),
        ({"output_dir": "train.jsonl/out"}, {}, "train.jsonl is a file"),
        ({"per_device_train_batch_size": 0}, {}, "per_device_train_batch_size is 0, expected 1 or more"),
        ({"per_device_eval_batch_size": 0}, {}, "per_device_eval_batch_size is 0, expected 1 or more"),
        ({"gradient_accumulation_steps": -2}, {}, "gradient_accumulation_steps is -2, expected 1 or more"),
        (
            {"per_device_train_batch_size": 16, "dataloader_drop_last": True},
            {},
            "15 training examples do not fill a batch of 16",
        ),
        ({"accelerator_config": "none.json"}, {}, "none.json"),
        ({}, {"log_samples": -1}, "--log_samples=-1: expected 0 or more"),
        ({}, {"log_samples": 2}, "--log_samples=2 answers evaluation examples. Give --eval_data_path"),
        ({}, {"log_samples": 2, "eval_data_path": "train.jsonl"}, 'Set it to "tensorboard"'),
        ({}, {"seed": -1}, "--seed -1: expected 0 to 4,294,967,295"),
        ({}, {"prompt_text": "a\udcff"}, "--prompt_text 'a\\udcff': broken UTF-8"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="what a GPU allows differs")
def test_refusals_come_before_training(train, no_training, args, flags, message, tmp_path):
    with pytest.raises(UserError) as error_info:
        train(args=args, **flags)
    assert message in str(error_info.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_bf16_on_a_gpu_without_it_is_refused(train, no_training, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    for args, flags in (({}, {"compute_dtype": "bf16"}), ({"bf16": True}, {})):
        with pytest.raises(UserError, match="Old GPU has no bf16. Use fp16 or fp32"):
            train(args=args, **flags)


def test_a_quantized_base_is_refused(train, no_training, model_dir, tmp_path):
    write_quantized(model_dir, tmp_path / "int4")
    with pytest.raises(UserError, match="quantized already.*Give the fp16 checkpoint"):
        train(model_name_or_path=str(tmp_path / "int4"))


def test_an_adapter_as_base_is_refused(train, no_training, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    with pytest.raises(UserError, match="a LoRA adapter, not a base model"):
        train(model_name_or_path=str(tmp_path / "adapter"))


@pytest.mark.parametrize("flags", [{"lora_rank": 0}, {"lora_dropout": 1.0}, {"train_args_json": "none.json"}])
def test_the_base_is_not_fetched_before_flags_are_right(train, monkeypatch, flags):
    monkeypatch.setattr(settings, "open_checkpoint", lambda name: pytest.fail("a base was asked for"))
    with pytest.raises(UserError):
        train(**flags)


def test_flags_are_the_issues():
    parameters = inspect.signature(stage.train_qlora).parameters
    expected = "train_args_json model_name_or_path hub init_lora_path train_data_path eval_data_path eval_ratio "
    expected += "prompt_column response_column history_column sheet seed max_input_length "
    expected += "max_output_length truncated_answers loss_on "
    expected += "lora_rank lora_alpha lora_dropout resume_from_checkpoint prompt_text compute_dtype "
    expected += "lora_targets packing early_stopping_patience log_samples dry_run output_json evaluate_after"
    assert " ".join(parameters) == expected
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    followers = {name: defaults.pop(name) for name in DEFAULTS}  # they follow the adapter of init_lora_path, if any
    assert set(followers.values()) == {None}
    help_text = " ".join(stage.train_qlora.__doc__.split())
    assert all(f"else {value or 'none'}" in help_text for value in DEFAULTS.values())
    defaults |= DEFAULTS
    assert defaults["model_name_or_path"] == FAMILIES[1].hub_ids[0] == "THUDM/chatglm2-6b"
    assert (defaults["max_input_length"], defaults["max_output_length"]) == (512, 1536)
    assert (defaults["lora_rank"], defaults["lora_alpha"], defaults["lora_dropout"]) == (4, 32, 0.05)
    assert (defaults["compute_dtype"], defaults["lora_targets"]) == ("auto", "query_key_value")
    assert (defaults["packing"], defaults["log_samples"], defaults["dry_run"]) == (True, 0, False)


def test_a_misspelt_flag_ends_the_command(capsys, no_training):
    with pytest.raises(SystemExit) as exit_info:
        run_cli(stage.train_qlora, ["--lora_rnak=8"])
    assert exit_info.value.code == 1
    assert "Did you mean --lora_rank?" in capsys.readouterr().err


def test_bad_input_as_a_command(write, tmp_path):
    """One real process: exit code, one message, no traceback."""
    data = write("train.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n')
    command = [sys.executable, "train_qlora.py", "--train_data_path", str(data)]
    result = subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"{data}:2: the example has no 'output'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_the_log_holds_no_hints_of_libraries(write, train_path, model_dir, tmp_path):
    """One real process, because what libraries say while they are imported or once only is gone by now."""
    args = write("args.json", {**ARGS, "max_steps": 1, "save_strategy": "no", "output_dir": str(tmp_path / "out")})
    command = [sys.executable, "train_qlora.py", "--model_name_or_path", str(model_dir)]
    command += ["--train_args_json", str(args), "--train_data_path", str(train_path)]
    result = subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, text=True, check=True)
    hints = ("kernels-community", "is_gradient_checkpointing", "non_blocking")
    assert [hint for hint in hints if hint in result.stderr] == []


def test_adapters_are_peft_adapters(train, model_dir):
    out = train(args={"max_steps": 1, "save_strategy": "no"})
    model = peft.PeftModel.from_pretrained(load_base_model(open_checkpoint(model_dir)), str(out))
    assert model.peft_config["default"].r == 4


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_the_file_chooses_the_optimizer(train, optim):
    out = train(args={"max_steps": 2, "save_strategy": "no", "optim": optim}, lora_dropout=0.0)
    assert all(tensor.abs().max() > 0 for key, tensor in adapter_state(out).items() if "lora_B" in key)


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_resume_with_other_batches_is_refused(train, checkpoint, no_training):
    with pytest.raises(UserError, match="packing is true in the checkpoint and false now"):
        train(resume_from_checkpoint=str(checkpoint), packing=False)
    with pytest.raises(UserError, match='train_sampling_strategy is "random" in the checkpoint and "sequential" now'):
        train(args={"train_sampling_strategy": "sequential"}, resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_padded_batches_have_similar_lengths_unless_the_file_says_otherwise(train):
    args = {"max_steps": 1, "save_strategy": "no"}
    for name, more, expected in (
        ("plain", {}, "group_by_length"),
        ("random", {"train_sampling_strategy": "random"}, "random"),
    ):
        out = train(name, args={**args, **more}, packing=False)
        record = json.loads((out / "run_config.json").read_text())
        assert record["identity"]["train_sampling_strategy"] == expected
        assert record["identity"]["packing"] is False
        assert record["identity"]["compute_dtype"] in ("fp32", "bf16")  # what auto stands for here


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_all_tokens_are_counted_without_padding(train):
    counts = []
    for packing, who in ((True, "no"), (False, "no"), (True, "all"), (False, "non_padding")):
        args = {"num_train_epochs": 1, "max_steps": -1, "save_strategy": "no", "include_num_input_tokens_seen": who}
        out = train(f"{packing}-{who}", args=args, packing=packing)
        state = json.loads((out / "trainer_state.json").read_text())
        counts.append(state["num_input_tokens_seen"])
        record = json.loads((out / "run_config.json").read_text())
        assert counts[-1] == record["data"]["train"]["num_tokens"]
        assert json.loads((out / "train_results.json").read_text())["train_tokens_per_second"] > 0


def test_columns_of_a_table_are_named(train, write):
    """The columns of a table may have any name; what is trained is the same."""
    plain = write("plain.csv", "question,answer\n裙,好\n裤,很好\n")
    named = write("named.csv", "答,问\n好,裙\n很好,裤\n")
    first = train(name="plain", train_data_path=str(plain))
    second = train(name="named", train_data_path=str(named), prompt_column="问", response_column="答")
    assert_same_bits(first, second)


# ---- several files, mixtures, held-out examples


@pytest.fixture
def two_files(write):
    """Two training files, 15 and 5 examples, half and half."""
    first = write("first.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in EXAMPLES))
    rows = [{"question": f"问{number}", "answer": f"答{number}"} for number in range(5)]
    second = write("second.csv", "question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in rows))
    return f"{first}:0.5,{second}:0.5"


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_a_mixture_with_held_out_examples_resumes_with_the_same_bits(train, two_files, log_lines):
    args = {"max_steps": 4, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    flags = {"train_data_path": two_files, "eval_ratio": 0.2, "lora_dropout": 0.1}
    complete = train("complete", args=args, **flags)
    assert any("mixture by tokens: " in line for line in log_lines)
    shutil.copytree(complete / "checkpoint-2", complete.parent / "resumed" / "checkpoint-2")
    assert_same_bits(complete, train("resumed", args=args, resume_from_checkpoint="latest", **flags))

    record = json.loads((complete / "run_config.json").read_text("utf-8"))
    train_uses, eval_uses = record["data_files"]["train"], record["data_files"]["eval"]
    assert [use["path"].rpartition("/")[2] for use in train_uses] == ["first.jsonl", "second.csv"]
    assert sum(use["num_used"] for use in eval_uses) == record["data"]["eval"]["num_rows"] == 4
    num_second = 5 - eval_uses[1]["num_used"]
    assert [use["num_used"] for use in train_uses] == [num_second] * 2
    assert record["data"]["train"]["num_rows"] == 2 * num_second
    assert record["identity"]["eval_ratio"] == record["arguments"]["eval_ratio"] == 0.2
    assert record["arguments"]["train_data_path"] == [use["path"] for use in train_uses]
    assert record["arguments"]["eval_data_path"] is None
    card = (complete / "README.md").read_text("utf-8")
    assert f"- train: first.jsonl ({num_second} of 15), second.csv" in card
    assert f"- eval: first.jsonl ({eval_uses[0]['num_used']} of 15)" in card


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_other_shares_ratios_and_files_are_refused_on_resume(train, two_files, tmp_path):
    """A run of before these flags goes on with their defaults only."""
    first, second = (part.rpartition(":")[0] for part in two_files.split(","))
    start = train(args={"save_steps": 1, "max_steps": 2}, train_data_path=two_files) / "checkpoint-1"
    for flags, message in (
        ({"train_data_path": f"{first}:0.6,{second}:0.4"}, "train_mixture is"),
        ({"train_data_path": f"{first},{second}"}, "train_mixture is .* in the checkpoint and null now"),
        ({"train_data_path": f"{second}:0.5,{first}:0.5"}, "train_data_sha256 is"),
        ({"train_data_path": first}, "train_data_sha256 is"),
        ({"train_data_path": two_files, "eval_ratio": 0.2}, "eval_ratio is null in the checkpoint and 0.2 now"),
    ):
        with pytest.raises(UserError, match=message):
            train(resume_from_checkpoint=str(start), **flags)
    record = json.loads((start / "run_config.json").read_text("utf-8"))
    identity = {key: record["identity"].pop(key) for key in ("eval_ratio", "train_mixture")}
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(start / "adapter_config.json", old)
    (old / "run_config.json").write_text(json.dumps(record))
    resume.check_same_run(old, {**record["identity"], "eval_ratio": None, "train_mixture": None})
    with pytest.raises(UserError, match="train_mixture is null in the checkpoint"):
        resume.check_same_run(old, {**record["identity"], **identity})


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_the_evaluation_at_the_end_judges_the_held_out_examples(train, train_path, model_dir, monkeypatch):
    judged = {}

    def judge(output_dir, lora_dir, source, examples, *args, **more):
        judged[source] = examples

    monkeypatch.setattr(at_end, "check_evaluation", lambda output_dir: None)
    monkeypatch.setattr(at_end, "evaluate_output", judge)
    train(args={"max_steps": 1, "eval_strategy": "no"}, eval_ratio=0.2, seed=5, evaluate_after=True)
    ((source, examples),) = judged.items()
    assert source == f"--eval_ratio 0.2 of {train_path}"
    expected = read_training_data(str(train_path), eval_ratio=0.2).draw(5)
    assert [one.query for one in examples] == [one.query for one in expected.examples["eval"]]
    assert len(examples) == 3


def test_without_data_the_sample_is_split():
    """--eval_ratio without --train_data_path holds out of the sample, and leaves dev.jsonl alone."""
    assert inputs.find_data(None, None, 0.01) == ("data/train.jsonl", None)
    assert inputs.find_data(None, None, None) == ("data/train.jsonl", "data/dev.jsonl")
    assert inputs.find_data("x", None, None) == ("x", None)


def test_what_peft_makes_of_the_targets_is_not_recorded(train, monkeypatch):
    """It shortens long lists in place; a resumed run, which compares them before, would find others."""
    make = peft.get_peft_model

    def shortening(model, config):
        made = make(model, config)
        config.target_modules = {"shortened"}
        return made

    monkeypatch.setattr(peft, "get_peft_model", shortening)
    out = train(args={"max_steps": 1, "save_strategy": "no"})
    assert json.loads((out / "run_config.json").read_text("utf-8"))["identity"]["lora_targets"] == ["query_key_value"]


def test_the_best_step_is_that_of_one_evaluation_file(train, write):
    """Where the loss decides which step is kept, a resumed run must be evaluated on the same data."""
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    paths = [str(write(name, EXAMPLES[:number])) for name, number in (("easy.json", 2), ("hard.json", 3))]
    out = train(args={**best, "max_steps": 2}, eval_data_path=paths[0])
    with pytest.raises(UserError, match="eval_data_sha256 is .* in the checkpoint and .* now"):
        train(args={**best, "max_steps": 3}, eval_data_path=paths[1], resume_from_checkpoint=str(out / "checkpoint-1"))


def test_files_that_a_report_must_not_replace(tmp_path, model_dir, write):
    (tmp_path / "adapter").mkdir()
    config = write("adapter/adapter_config.json", {})
    flags = SimpleNamespace(model_name_or_path=str(model_dir), init_lora_path=str(config.parent))
    found = {path.resolve() for path in inputs.files_of(flags, None)}
    assert {config, model_dir / "config.json", PROJECT_DIR / FAMILIES[0].train_args_json} <= found
