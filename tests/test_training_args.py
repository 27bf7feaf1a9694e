"""TrainingArguments files: today's keys, those of transformers 4.30, and errors that name the line."""

import json
import os

import pytest
from transformers import TrainingArguments

from glm_utils.cli import UserError
from glm_utils.family import FAMILIES, PROJECT_DIR
from glm_utils.training.build_args import build_args
from glm_utils.training.training_args import read_train_args

OLD_FILE = PROJECT_DIR / "tests" / "fixtures" / "train_args_2023.json"
KEYS_OF_4_30 = """
output_dir overwrite_output_dir do_train do_eval do_predict evaluation_strategy prediction_loss_only
per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps eval_accumulation_steps eval_delay
learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm num_train_epochs max_steps
lr_scheduler_type warmup_ratio warmup_steps log_level log_level_replica log_on_each_node logging_dir logging_strategy
logging_first_step logging_steps logging_nan_inf_filter save_strategy save_steps save_total_limit save_safetensors
save_on_each_node no_cuda use_mps_device seed data_seed jit_mode_eval use_ipex bf16 fp16 fp16_opt_level
half_precision_backend bf16_full_eval fp16_full_eval tf32 local_rank ddp_backend tpu_num_cores tpu_metrics_debug debug
dataloader_drop_last eval_steps dataloader_num_workers past_index run_name disable_tqdm remove_unused_columns
label_names load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip fsdp fsdp_config deepspeed
label_smoothing_factor optim optim_args adafactor group_by_length length_column_name report_to
ddp_find_unused_parameters ddp_bucket_cap_mb dataloader_pin_memory skip_memory_metrics use_legacy_prediction_loop
push_to_hub resume_from_checkpoint hub_model_id hub_strategy hub_token hub_private_repo gradient_checkpointing
include_inputs_for_metrics fp16_backend push_to_hub_model_id push_to_hub_organization push_to_hub_token mp_parameters
auto_find_batch_size full_determinism torchdynamo ray_scope ddp_timeout torch_compile torch_compile_backend
torch_compile_mode xpu_backend
"""


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")  # restored afterwards, whatever the test sets
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_shipped_files_are_todays(family, log_lines):
    args = build_args(read_train_args(PROJECT_DIR / family.train_args_json), use_cpu=True)
    assert log_lines == []
    assert args.eval_strategy == "steps"
    assert args.get_warmup_steps(100) == 10
    assert args.report_to == ["tensorboard"]
    assert args.gradient_checkpointing is True
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_2023_file_keeps_its_meaning(log_lines):
    args_file = read_train_args(OLD_FILE)
    args = build_args(args_file, use_cpu=True)
    assert args_file.overwrite_output_dir is True
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "saved_files/chatGLM2_6B_QLoRA_t32/logs"
    assert args.eval_strategy == "steps"
    assert args.eval_steps == 200
    assert args.get_warmup_steps(1000) == 100
    assert args.train_sampling_strategy == "group_by_length"
    assert args.gradient_checkpointing is True
    assert args.per_device_train_batch_size == 4
    assert args.learning_rate == 3e-4
    assert args.optim == "adamw_torch"


def test_2023_file_logs_one_warning_per_key_with_its_line(log_lines):
    build_args(read_train_args(OLD_FILE), use_cpu=True)
    old = "overwrite_output_dir warmup_ratio logging_dir evaluation_strategy save_safetensors half_precision_backend "
    old += "group_by_length no_cuda"
    if hasattr(TrainingArguments, "activation_checkpointing"):  # transformers 5.17 still has the old name
        old += " gradient_checkpointing"
    lines = OLD_FILE.read_text().splitlines()
    for key in old.split():
        number = next(index for index, line in enumerate(lines, start=1) if f'"{key}":' in line)
        assert sum(line.startswith(f"WARNING {OLD_FILE}:{number}: {key} ") for line in log_lines) == 1, key
    assert len(log_lines) == len(old.split())


def test_no_cuda_and_adafactor(write):
    args = build_args(read_train_args(write("a.json", {"output_dir": "x", "no_cuda": True, "adafactor": True})))
    assert args.use_cpu is True
    assert args.optim == "adafactor"


@pytest.mark.parametrize(
    ("values", "num_warmup"),
    [
        ({"warmup_ratio": 0.1}, 10),
        ({"warmup_ratio": 0}, 0),
        ({"warmup_ratio": 1}, 100),  # 1 taken as warmup_steps would be one step
        ({"warmup_ratio": 0.1, "warmup_steps": 0}, 10),
        ({"warmup_ratio": 0.1, "warmup_steps": 7}, 7),  # as in 4.30, steps win
        ({"warmup_steps": 7}, 7),
    ],
)
def test_warmup(write, values, num_warmup):
    args = build_args(read_train_args(write("a.json", {"output_dir": "x", **values})), use_cpu=True)
    assert args.get_warmup_steps(100) == num_warmup


@pytest.mark.parametrize("key", KEYS_OF_4_30.split())
def test_every_key_of_4_30_is_known(write, key):
    values = {"output_dir": "x", key: 0.1 if key == "warmup_ratio" else None}
    message = ""
    try:
        read_train_args(write("a.json", values))
    except UserError as error:  # null is not valid for most keys: only the key matters here
        message = str(error)
    assert "is not a TrainingArguments key" not in message


def test_checkpointing_can_be_turned_off(write):
    for key in ("gradient_checkpointing", "activation_checkpointing"):
        args = build_args(read_train_args(write("a.json", {"output_dir": "x", key: False})), use_cpu=True)
        assert args.gradient_checkpointing is False


def test_tensorboard_is_on_unless_the_file_says_otherwise(write):
    assert build_args(read_train_args(write("a.json", {"output_dir": "x"})), use_cpu=True).report_to == ["tensorboard"]
    values = {"output_dir": "x", "report_to": "none"}
    assert build_args(read_train_args(write("a.json", values)), use_cpu=True).report_to == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"output_dir": "x",\n"learnig_rate": 1}', ":3: learnig_rate is not a TrainingArguments key. Did you mean"),
        ('{\n"output_dir": "x",\n"eval_stratgy": 1}', "Did you mean eval_strategy?"),
        ('{"output_dir": "x",\n"learning_rate": "3e-4"}', ':2: learning_rate is "3e-4", expected float'),
        ('{"output_dir": "x",\n"per_device_train_batch_size": 4.5}', "_batch_size is 4.5, expected int"),
        ('{"output_dir": "x",\n"fp16": 1}', ":2: fp16 is 1, expected bool"),
        ('{"output_dir": "x",\n"max_steps": true}', ":2: max_steps is true, expected int"),
        ('{"output_dir": "x",\n"warmup_ratio": 3}', ":2: warmup_ratio is 3, expected a number from 0 to 1"),
        ('{"output_dir": "x",\n"overwrite_output_dir": "yes"}', ":2: overwrite_output_dir is"),
        ('{"output_dir": "x",\n"seed": 1,\n"seed": 2}', "seed is given twice"),
        ('{"eval_strategy": "no",\n"evaluation_strategy": "no",\n"output_dir": "x"}', ":2: evaluation_strategy and"),
        ('{"output_dir": "x",\n\n"seed": }', ":3: broken JSON"),
        ('{"output_dir": "x",\n"label_smoothing_factor": 0.1}', ":2: label_smoothing_factor is not supported"),
        ('{"output_dir": "x",\n"bf16_full_eval": true}', "rounded before they are saved. Delete the line"),
        ("[]", "expected a JSON object"),
        ("", ":1: broken JSON"),
        ("[" * 100_000, ":1: broken JSON"),
        ('{"seed": 1}', "output_dir is missing"),
    ],
)  # fmt: skip
def test_faults_name_file_line_and_remedy(write, text, message):
    path = write("args.json", text)
    with pytest.raises(UserError) as error_info:
        read_train_args(path)
    assert str(error_info.value).startswith(str(path))
    assert message in str(error_info.value)


@pytest.mark.parametrize(
    "values",
    [
        {"fp16": True, "bf16": True},
        {"eval_strategy": "sometimes"},
        {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "no"},
    ],
)
def test_contradictions_are_user_errors(write, values):
    path = write("args.json", json.dumps({"output_dir": "x", **values}))
    with pytest.raises(UserError, match="args.json"):
        build_args(read_train_args(path), use_cpu=True)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_train_args(tmp_path / "none.json")
