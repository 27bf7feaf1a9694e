"""TrainingArguments files: today's keys, those of transformers 4.30, and errors that name the line."""

import dataclasses
import inspect
import json
import os
import typing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

import train_qlora as stage
from glm_utils.cli import UserError, union_members
from glm_utils.family import FAMILIES, PROJECT_DIR
from glm_utils.training.argument_keys import ARGUMENTS, CHECKPOINTING_KEYS, FLAGS, OTHER_KEYS
from glm_utils.training.argument_rules import OPTIMIZERS, REFUSED_OPTIMIZERS, TRACKERS
from glm_utils.training.build_args import build_args, make_training_args, try_training_args
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


# ---- the static list


def json_kinds(annotation):
    """Return the JSON types of an annotation; anything that JSON does not have is written as a text or an object."""
    kinds = {typing.get_origin(member) or member for member in union_members(annotation)}
    return {kind if kind in (bool, int, float, str, list, dict, type(None)) else "other" for kind in kinds}


def test_the_list_knows_every_field_of_the_installed_transformers():
    """A new version's key is noticed here, and its entry says whether it is supported."""
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert fields - ARGUMENTS.keys() == set()
    missing = set() if "activation_checkpointing" in fields else {key for key in ARGUMENTS if "activation_ch" in key}
    assert ARGUMENTS.keys() - fields == missing  # 5.17 to 5.22 have one name only


@pytest.mark.parametrize("field", dataclasses.fields(TrainingArguments), ids=lambda field: field.name)
def test_types_are_those_of_the_installed_transformers(field):
    """The list may be narrower, never wider, but for switches that older versions write as a bool."""
    ours = json_kinds(ARGUMENTS[field.name].kind)
    theirs = json_kinds(typing.get_type_hints(TrainingArguments)[field.name])
    if "other" in theirs:
        theirs |= {str, dict}
    wider = {"resume_from_checkpoint", "ddp_backend", "hub_always_push", "fsdp", *CHECKPOINTING_KEYS}
    wider |= {"trackio_static_space_id"}
    assert ours <= theirs or field.name in wider


def test_optimizers_and_schedules_are_those_of_the_installed_transformers():
    optimizers = {name.value for name in OptimizerNames}
    assert {name for name in optimizers if not name.startswith(tuple(REFUSED_OPTIMIZERS))} <= set(OPTIMIZERS)
    assert {name.value for name in SchedulerType} <= set(ARGUMENTS["lr_scheduler_type"].choices)


def test_trackers_are_those_of_the_installed_transformers():
    assert INTEGRATION_TO_CALLBACK.keys() <= TRACKERS.keys()


def test_flags_are_those_of_the_script():
    flags = set(inspect.signature(stage.train_qlora).parameters)
    assert set(FLAGS) == flags - {"seed", "resume_from_checkpoint"}
    assert not set(FLAGS) & ARGUMENTS.keys()


def test_defaults_pass(write):
    """No default of transformers is refused: a file that spells them out works."""
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(TrainingArguments)
        if field.default is not dataclasses.MISSING
        and isinstance(field.default, bool | int | float | str)
        and field.name not in CHECKPOINTING_KEYS
    }
    tried(write("a.json", {**defaults, "output_dir": "x"}))


# ---- what the Trainer would refuse


def tried(path, num_steps=4, packing=True, has_eval=True):
    """Read a file, make its TrainingArguments and try them, as before a model is loaded."""
    file = read_train_args(path)
    training_args = make_training_args(file, None, "fp32", has_eval, packing)
    try_training_args(file, training_args, num_steps)
    return training_args


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": -1}, "learning_rate is -1, expected 0 or more"),
        ({"learning_rate": 10**400}, "expected 0 or more"),
        ({"adam_beta1": 1.5}, "adam_beta1 is 1.5, expected 0 to below 1"),
        ({"adam_beta2": 1}, "adam_beta2 is 1, expected 0 to below 1"),
        ({"adam_epsilon": 0}, "adam_epsilon is 0, expected above 0"),
        ({"weight_decay": -0.1}, "expected 0 or more"),
        ({"max_grad_norm": -1}, "expected 0 or more"),
        ({"warmup_steps": -1}, "expected 0 or more"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0, expected above 0: nothing would be trained"),
        ({"num_train_epochs": -1}, "expected above 0: nothing would be trained"),
        ({"num_train_epochs": 1e9}, "expected -1 to 1,000,000"),
        ({"max_steps": -2}, "expected -1 or more"),
        ({"seed": -1}, "seed is -1, expected 0 to 4,294,967,295"),
        ({"data_seed": 2**32}, "expected 0 to 4,294,967,295"),
        ({"save_total_limit": 0}, "save_total_limit is 0, expected 1 or more"),
        ({"eval_accumulation_steps": 0}, "expected 1 or more"),
        ({"logging_steps": 0}, "logging_steps"),
        ({"logging_steps": 1.5}, "logging_steps must be an integer"),
        ({"save_steps": -5}, "expected 0 or more"),
        ({"dataloader_num_workers": -1}, "expected 0 to 256"),
        ({"dataloader_prefetch_factor": 2}, "needs dataloader_num_workers above 0"),
        ({"dataloader_persistent_workers": True}, "needs dataloader_num_workers above 0"),
        ({"report_to": "wandb"}, "report_to is wandb, which is not installed. Run pip install wandb"),
        ({"report_to": ["tensorboard", "swanlab"]}, "Run pip install swanlab"),
        ({"report_to": "wndb"}, 'no "wndb". Did you mean wandb?'),
        ({"optim": "galore_adamw", "optim_target_modules": ["dense"]}, "is not supported"),
        ({"optim": "galore_adamw"}, "optim galore_adamw is not supported: GaLore"),
        ({"optim": "apollo_adamw"}, "optim apollo_adamw is not supported: APOLLO"),
        ({"optim": "lomo"}, "LOMO updates weights within the backward pass"),
        ({"optim": "schedule_free_adamw"}, 'optim "schedule_free_adamw" cannot be used:'),
        ({"optim": "adam"}, 'optim is "adam", which is no such value. Did you mean'),
        ({"optim": "sgd", "optim_args": "momentum=x"}, "optim_args"),
        ({"optim_args": "nonsense"}, "optim_args"),
        (
            {"metric_for_best_model": "bleu"},
            'metric_for_best_model is "bleu", which is no such value. Known values: loss, eval_loss',
        ),
        ({"greater_is_better": True, "metric_for_best_model": "loss"}, "the highest loss"),
        ({"save_strategy": "best"}, 'Add "metric_for_best_model": "eval_loss"'),
        ({"save_strategy": "best", "eval_strategy": "no"}, "save_strategy needs evaluations"),
        ({"load_best_model_at_end": True, "eval_strategy": "no"}, "load_best_model_at_end needs evaluations"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type"),
        ({"lr_scheduler_type": "polynomial", "learning_rate": 0}, "lr_scheduler_type"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1}}, "lr_scheduler_kwargs"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": -1}}, "lr_scheduler_kwargs"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "x"}}, "lr_scheduler_kwargs"),
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"power": 2}}, "unexpected keyword argument 'power'"),
        ({"lr_scheduler_type": "cosin"}, "no such value. Did you mean cosine?"),
        ({"fsdp": "full_shard"}, "fsdp is not supported: each process holds the complete 4-bit model"),
        ({"deepspeed": "ds.json"}, "deepspeed is not supported"),
        ({"parallelism_config": {"tp_size": 2}}, "parallelism_config is not supported"),
        ({"parallelism_config": "text"}, "expected dict or None"),
        ({"torch_compile": True}, "torch_compile is not supported"),
        ({"push_to_hub": True}, "nothing is uploaded while training"),
        ({"hub_token": "hf_x"}, "Every checkpoint would hold the token"),
        ({"gradient_checkpointing_kwargs": "text"}, 'gradient_checkpointing_kwargs is "text", expected dict or None'),
        ({"gradient_checkpointing_kwargs": {"a": 1}}, "the memory plan decides which blocks are recomputed"),
        ({"accelerator_config": {"split_batches": True}}, "is not supported, only non_blocking"),
        ({"accelerator_config": {"non_blocking": "x"}}, '"non_blocking" is "x", expected bool'),
        ({"label_names": [1]}, "expected a list of texts"),
        ({"log_level": "loud"}, '"loud", which is no such value. Known values: debug, info'),
        ({"eval_strategy": "sometimes"}, "no such value. Known values: no, steps, epoch"),
        ({"output_dir": "C:\new"}, "Write / or"),
        ({"lora_rank": 8}, "It is a flag: give --lora_rank on the command line, and delete the line"),
        ({"foo": 1}, "foo is not a TrainingArguments key. Delete the line, or see docs/training.md"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_what_the_trainer_would_refuse_is_refused_before_a_model_is_loaded(write, values, message):
    """One line that names the file, the line of the setting, and what to do."""
    text = json.dumps({"output_dir": "x", "eval_strategy": "steps", **values}, indent=0)
    path = write("args.json", text)
    with pytest.raises(UserError) as error_info:
        tried(path)
    found = str(error_info.value)
    assert message in found
    assert "\n" not in found
    lines = [number for number, line in enumerate(text.splitlines(), 1) if any(f'"{key}":' in line for key in values)]
    assert any(found.startswith(f"{path}:{line}: ") for line in lines), found


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("text", ['"learning_rate": {}', '"max_steps": {}', '"lr_scheduler_kwargs": {{"a": {}}}'])
def test_numbers_are_finite(write, word, text):
    path = write("args.json", '{"output_dir": "x",\n' + text.format(word) + "}")
    with pytest.raises(UserError, match=rf"args.json:2: {word} is not a finite number"):
        read_train_args(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"output_dir": "x", // where\n"seed": 1}', ":1: broken JSON.*JSON has no comments. Delete them"),
        ('{"output_dir": "x",\n# where\n"seed": 1}', ":2: broken JSON.*JSON has no comments. Delete them"),
        ('{\n/* where */ "output_dir": "x"}', ":2: broken JSON.*JSON has no comments. Delete them"),
        ('{"output_dir": "x",\n"seed": 1,\n}', ":(2|3): broken JSON.*Delete the comma behind the last entry"),
        ('{"output_dir": "x", "report_to": ["none",]}', ":1: broken JSON.*Delete the comma behind the last entry"),
        ('{"output_dir": "C:\\Users\\me"}', r":1: broken JSON.*Write / or two backslashes in paths: \"C:/Users/me\""),
        ("{'output_dir': 'x'}", ":1: broken JSON.*double quotes"),
        ('{"output_dir": "x",\n"bf16": True}', ":2: broken JSON.*Write true instead of True"),
        ('{"output_dir": "x"\n"seed": 1}', ":2: broken JSON.*Put a comma between the entries"),
    ],
)
def test_faults_of_json_have_their_remedies(write, text, message):
    with pytest.raises(UserError, match=message):
        read_train_args(write("args.json", text))


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["no", "steps", ""]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=8), inner, max_size=2),
    max_leaves=4,
)


def plausible(key):
    """Return values of the right JSON type for a key, so that more files get past the types."""
    by_kind = {bool: st.booleans(), int: st.integers(-2, 70), float: st.floats(-1, 70), str: st.text(max_size=8)}
    by_kind |= {dict: st.dictionaries(st.sampled_from(["min_lr", "power", "non_blocking"]), JSON_VALUES, max_size=2)}
    by_kind |= {list: st.lists(st.text(max_size=4), max_size=2), type(None): st.none()}
    choices = st.sampled_from(ARGUMENTS[key].choices) if ARGUMENTS[key].choices else st.nothing()
    return st.one_of(choices, *(by_kind[kind] for kind in sorted(json_kinds(ARGUMENTS[key].kind), key=str)))


@st.composite
def setting_files(draw):
    """Draw an object of known keys with any JSON values, most of them of the right type."""
    keys = draw(st.lists(st.sampled_from(sorted([*ARGUMENTS, *OTHER_KEYS])), max_size=5, unique=True))
    values = {key: draw(plausible(key) if key in ARGUMENTS and draw(st.booleans()) else JSON_VALUES) for key in keys}
    values.setdefault("output_dir", "x")
    if draw(st.booleans()):
        values["lr_scheduler_type"] = draw(st.sampled_from(["polynomial", "cosine_with_min_lr", "greedy", "linear"]))
    return values


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(values=setting_files())
def test_any_values_of_known_keys_build_or_are_refused_in_one_line(write, values):
    path, message = write("args.json", json.dumps(values)), ""
    try:
        tried(path)
    except UserError as error:
        message = str(error)
    assert message.startswith(str(path) if message else "")
    assert message.isprintable()
