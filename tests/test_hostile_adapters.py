"""Adapters that are damaged or malicious: one line that names the file, no code run, no giant allocation, no hang."""

import json
import os
import re
import shutil
import time
from types import SimpleNamespace

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

import merge_lora_and_quantize as merge_stage
from glm_utils.adapter import find_base, read_adapter, read_updates
from glm_utils.adapter_record import read_training_record
from glm_utils.checkpoint import open_checkpoint
from glm_utils.cli import UserError
from glm_utils.evaluation.job import find_limits
from glm_utils.load_model import find_model, load_adapter, load_base_model
from glm_utils.merging.job import nf4_dtype
from glm_utils.model_card import adapter_card, merged_card
from glm_utils.model_files.adapter_config import AdapterConfig, read_adapter_config
from glm_utils.model_files.module_names import PatternTable, read_names
from glm_utils.model_files.tensor_files import list_tensors
from glm_utils.training.resume import check_same_run
from tests.conftest import PROJECT_DIR
from tests.hostile_adapters import (
    CONFIG_CHANGES,
    RECORDS,
    REGEX_BOMB,
    damaged,
    lying_header,
    refusal,
    tensor_changes,
    write_adapter,
)

BASE_DIR = PROJECT_DIR / "models" / "chatglm2-tiny"
SHAPES = {
    name.removesuffix(".weight"): spec.shape
    for name, spec in list_tensors(BASE_DIR / "model.safetensors").items()
    if name.endswith((".query_key_value.weight", ".dense.weight"))
}
# A deadline finds what hangs; the examples are the same in every run, the campaign draws others
FUZZ = settings(max_examples=150, deadline=5000, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def whole_adapter(tmp_path_factory):
    """An adapter of the tiny model without a fault; tests copy it."""
    return write_adapter(tmp_path_factory.mktemp("whole") / "adapter", BASE_DIR, SHAPES)


@pytest.fixture
def adapter_dir(whole_adapter, tmp_path):
    """An adapter of the tiny model, free to be broken."""
    return shutil.copytree(whole_adapter, tmp_path / "adapter")


def edit(adapter_dir, **changes):
    """Change settings of an adapter."""
    path = adapter_dir / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def use(adapter_dir):
    """Do with an adapter what merge, chat and evaluation do before a model is loaded."""
    adapter = read_adapter(adapter_dir)
    base = find_base(adapter)
    adapter.check_fit(SHAPES, str(base.directory))
    assert nf4_dtype(adapter.run_config) in (torch.float32, torch.bfloat16)
    find_limits([SimpleNamespace(source=SimpleNamespace(adapter=adapter))])
    json.dumps(adapter.run_config, ensure_ascii=False).encode()  # a merge copies it into its own record
    return adapter


def test_the_adapter_of_these_tests_is_whole(adapter_dir):
    assert set(use(adapter_dir).pairs) == set(SHAPES)


# ---- fuzz


@FUZZ
@given(changes=CONFIG_CHANGES)
def test_any_settings(whole_adapter, tmp_path_factory, changes):
    adapter_dir = shutil.copytree(whole_adapter, tmp_path_factory.mktemp("fuzz") / "adapter")
    edit(adapter_dir, **changes)
    message = refusal(lambda: use(adapter_dir))
    assert message is None or str(adapter_dir) in message
    refusal(lambda: check_same_run(adapter_dir, {"lora_rank": 2, "lora_targets": ["dense", "query_key_value"]}))


@FUZZ
@given(data=st.data())
def test_any_damage_to_the_files(whole_adapter, tmp_path_factory, data):
    adapter_dir = shutil.copytree(whole_adapter, tmp_path_factory.mktemp("fuzz") / "adapter")
    path = adapter_dir / "adapter_model.safetensors"
    kind = data.draw(st.sampled_from(["bytes", "header", "tensors", "settings"]))
    if kind == "settings":
        path = adapter_dir / "adapter_config.json"
    strategy = {"header": lying_header, "tensors": tensor_changes}.get(kind, damaged)
    content = load_file(path) if kind == "tensors" else path.read_bytes()
    path.write_bytes(data.draw(strategy(content)))
    message = refusal(lambda: use(adapter_dir))
    assert message is None or str(adapter_dir) in message


@settings(FUZZ, max_examples=60)
@given(data=st.data(), is_legacy=st.booleans())
def test_any_damage_to_a_bin(whole_adapter, tmp_path_factory, data, is_legacy):
    adapter_dir = shutil.copytree(whole_adapter, tmp_path_factory.mktemp("fuzz") / "adapter")
    path = adapter_dir / "adapter_model.bin"
    torch.save(
        load_file(adapter_dir / "adapter_model.safetensors"), path, _use_new_zipfile_serialization=not is_legacy
    )
    (adapter_dir / "adapter_model.safetensors").unlink()
    assert refusal(lambda: use(adapter_dir)) is None
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    message = refusal(lambda: use(adapter_dir))
    assert message is None or str(adapter_dir) in message


@FUZZ
@given(record=RECORDS)
def test_any_run_config(whole_adapter, tmp_path_factory, record):
    adapter_dir = shutil.copytree(whole_adapter, tmp_path_factory.mktemp("fuzz") / "adapter")
    (adapter_dir / "run_config.json").write_text(json.dumps(record), "utf-8")
    message = refusal(lambda: use(adapter_dir))
    assert message is None or str(adapter_dir) in message


# ---- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target_modules": REGEX_BOMB},
            "target_modules .* regular expressions of a file are not run. Write the names",
        ),
        ({"exclude_modules": REGEX_BOMB}, "exclude_modules .* regular expressions of a file are not run"),
        ({"rank_pattern": {REGEX_BOMB: 4}}, "rank_pattern .* regular expressions of a file are not run"),
        ({"alpha_pattern": {REGEX_BOMB: 4}}, "alpha_pattern .* regular expressions of a file are not run"),
        ({"target_modules": ["dense", ".*"]}, "target_modules holds '.*', which is not a name of a module"),
        ({"r": 2**30}, "r is 1073741824, expected a whole number from 1 to 65536"),
        ({"r": True}, "r is True, expected a whole number"),
        ({"r": 4}, "adapter_config.json says rank 4"),
        ({"rank_pattern": {"dense": 1}}, "says rank 1"),
        ({"lora_alpha": "4"}, "lora_alpha is '4', expected a number above 0"),
        ({"lora_alpha": 10**400}, "lora_alpha is 10+\\.+, expected a number above 0"),
        ({"alpha_pattern": {"dense": None}}, "alpha_pattern is .*, expected an object whose values are"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes', expected true or false"),
        ({"layers_to_transform": "1"}, "layers_to_transform is '1', expected a number or a list of numbers"),
        ({"auto_mapping": ["x"]}, "auto_mapping is .*, expected an object or null"),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path is .*, expected text"),
        ({"base_model_name_or_path": "a\x00b"}, "base_model_name_or_path is .*Write the base model's path there"),
        ({"base_model_name_or_path": "~nobody-here/base"}, "base_model_name_or_path is .*Write the base"),
        ({"target_modules": ["dense"]}, "unexpected weights of .*query_key.* does not name"),
        ({"layers_to_transform": [0]}, "unexpected weights of"),
        ({"lora_bias": True}, "lora_bias True cannot be merged here. Merge it with peft"),
    ],
)
def test_settings_are_refused_before_peft_sees_them(adapter_dir, changes, message):
    edit(adapter_dir, **changes)
    start = time.monotonic()
    with pytest.raises(UserError, match=message):
        use(adapter_dir)
    assert time.monotonic() - start < 2


def test_merge_and_chat_refuse_a_regular_expression(adapter_dir, tmp_path):
    edit(adapter_dir, rank_pattern={REGEX_BOMB: 4})
    for action in (
        lambda: merge_stage.merge_lora_and_quantize(lora_path=str(adapter_dir), output_path=str(tmp_path / "out")),
        lambda: find_model(None, str(adapter_dir)),
        lambda: load_adapter(None, adapter_dir),
    ):
        assert "regular expressions of a file are not run" in refusal(action)
    assert not (tmp_path / "out").exists()


def test_a_setting_of_a_later_peft_is_named(adapter_dir, log_lines):
    edit(adapter_dir, use_something_new=True, something_off=False)
    use(adapter_dir)
    assert [line for line in log_lines if "'use_something_new' are not settings that this project knows" in line]
    assert not [line for line in log_lines if "something_off" in line]


MODULES = [*SHAPES, "transformer.output_layer", "lm_head", "transformer.layers.10.attention.dense"]


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["dense"]},
        {"target_modules": ["self_attention.dense", "query_key_value"]},
        {"target_modules": [next(iter(SHAPES))]},
        {"target_modules": r".*\.query_key_value"},
        {"target_modules": r".*\.(query_key_value|dense)$"},
        {"target_modules": ".*dense"},
        {"target_modules": r".*\.layers\.1\.self_attention\.dense"},
        {"target_modules": ["dense", "query_key_value"], "exclude_modules": ["layers.1.self_attention.dense"]},
        {"target_modules": ["dense", "query_key_value"], "exclude_modules": r".*\.dense"},
        {"target_modules": ["dense"], "layers_to_transform": [1]},
        {"target_modules": ["dense"], "layers_to_transform": 0},
        {"target_modules": ["dense"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["dense"], "layers_to_transform": [1], "layers_pattern": ["blocks", "encoder.layers"]},
        {"target_modules": ["dense"], "layers_to_transform": [1], "layers_pattern": ["blocks"]},
        {"target_modules": ["dense"], "layers_to_transform": []},
    ],
)
def test_names_mean_what_they_mean_to_peft(adapter_dir, changes):
    edit(adapter_dir, **changes)
    config = read_adapter_config(adapter_dir)
    reference = peft.LoraConfig(**changes)
    for module in MODULES:
        expected = check_target_module_exists(reference, module)
        assert config.is_adapted(module) == (bool(expected) and "Excluded" not in type(expected).__name__), module


@pytest.mark.parametrize(
    "pattern",
    [
        {"dense": 3, "layers.1.self_attention.dense": 5},
        {"layers.1.self_attention.dense": 5, "dense": 3},
        {"^transformer.encoder.layers.0.self_attention.dense": 7, "query_key_value": 2},
        {r".*\.dense": 4},
        {r".*\.(dense|query_key_value)": 4},
        {},
    ],
)
def test_patterns_mean_what_they_mean_to_peft(tmp_path, pattern):
    table = PatternTable(pattern, "rank_pattern", tmp_path)
    for module in MODULES:
        assert table.get(module, 1) == pattern.get(get_pattern_key(pattern, module), 1), module


def test_all_linear_is_every_module(tmp_path):
    assert all(module in read_names("all-linear", "target_modules", tmp_path) for module in MODULES)


# ---- weights


@pytest.mark.parametrize("is_legacy", [False, True])
def test_code_in_a_bin_is_not_run(adapter_dir, tmp_path, is_legacy):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    (adapter_dir / "adapter_model.safetensors").unlink()
    torch.save({"x": Trap()}, adapter_dir / "adapter_model.bin", _use_new_zipfile_serialization=not is_legacy)
    message = refusal(lambda: use(adapter_dir))
    assert f"{adapter_dir}/adapter_model.bin" in message
    assert "only tensors are read" in message
    assert not (tmp_path / "executed").exists()


def test_a_view_that_claims_more_than_the_file_holds(adapter_dir):
    """2**40 numbers that are one number, repeated by a stride of 0, would take 4 TB in fp32."""
    (adapter_dir / "adapter_model.safetensors").unlink()
    giant = torch.zeros(1, dtype=torch.float16).expand(2, 2**39)
    torch.save({f"base_model.model.{next(iter(SHAPES))}.lora_A.weight": giant}, adapter_dir / "adapter_model.bin")
    assert "is larger than its data, not read" in refusal(lambda: use(adapter_dir))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, found: found.clear(), "holds no weights"),
        (lambda name, found: found.pop(name), "has only lora_B, lora_A is missing"),
        (lambda name, found: found.update({name: found[name].to(torch.int8)}), "expected floating-point numbers"),
        (lambda name, found: found.update({name: found[name] * torch.nan}), "holds NaN or infinite numbers"),
        (lambda name, found: found.update({name: found[name][0].clone()}), "says rank 2"),
        (
            lambda name, found: found.update({"base_model.model.a\x1b.lora_A.weight": found[name].clone()}),
            "is not a LoRA",
        ),
        (lambda name, found: found.update({f"{name}x": found[name].clone()}), "is not a LoRA matrix of a Linear"),
        (
            lambda name, found: found.update({name.replace(".weight", ".default.weight"): found[name].clone()}),
            "lora_A of .* stands twice",
        ),
        (
            lambda name, found: [found.pop(key) for key in [*found] if ".layers.0." in key],
            "its weights of .*layers.0.* and 1 more are missing",
        ),
    ],
)
def test_weights_that_are_wrong(adapter_dir, change, message):
    path = adapter_dir / "adapter_model.safetensors"
    tensors = load_file(path)
    change(min(tensors), tensors)
    save_file(tensors, path)
    found = refusal(lambda: use(adapter_dir))
    assert re.search(message, found)
    assert str(adapter_dir) in found


def test_the_model_gets_what_the_files_hold(adapter_dir):
    """Weights and scales are those that peft itself reads, also with ranks, alphas and rsLoRA by module."""
    path = adapter_dir / "adapter_model.safetensors"
    dense = ".layers.1.self_attention.dense."
    tensors = load_file(path)
    for key in [key for key in tensors if dense in key]:
        tensors[key] = (tensors[key][:1] if "lora_A" in key else tensors[key][:, :1]).clone()
    save_file(tensors, path)
    edit(
        adapter_dir, rank_pattern={dense.strip("."): 1}, alpha_pattern={"dense": 3}, use_rslora=True, lora_dropout=0.1
    )
    base = load_base_model(open_checkpoint(BASE_DIR))
    ours = load_adapter(base, adapter_dir)
    expected = peft.PeftModel.from_pretrained(load_base_model(open_checkpoint(BASE_DIR)), adapter_dir).eval()
    assert not ours.training
    assert not [name for name, parameter in ours.named_parameters() if parameter.requires_grad]
    assert ours.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    for path in SHAPES:
        modules = [model.get_base_model().get_submodule(path) for model in (ours, expected)]
        assert modules[0].scaling == modules[1].scaling


# ---- files beside them


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "run_config.json"])
def test_links_out_of_the_adapter_are_not_followed(adapter_dir, tmp_path, name):
    (adapter_dir / "run_config.json").write_text("{}")
    shutil.move(adapter_dir / name, tmp_path / "private.json")
    (adapter_dir / name).symlink_to(tmp_path / "private.json")
    assert re.search(f"{name}: a link out of its directory, to .*private.json", refusal(lambda: use(adapter_dir)))


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "run_config.json", "config.json"]
)
def test_pipes_are_not_waited_for(adapter_dir, name):
    (adapter_dir / name).unlink(missing_ok=True)
    os.mkfifo(adapter_dir / name)
    refused = refusal(lambda: find_model(None, str(adapter_dir)))
    assert refused is None if name in ("run_config.json", "config.json") else str(adapter_dir) in refused


def test_links_of_the_hub_and_inside_the_adapter_are_followed(adapter_dir, tmp_path):
    cached, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    cached.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(adapter_dir.iterdir())):
        blob = blobs / f"{number:064x}"
        shutil.copyfile(path, blob)
        (cached / path.name).symlink_to(f"../../blobs/{blob.name}")
    assert set(use(cached).pairs) == set(SHAPES)
    (adapter_dir / "adapter_config.json").rename(adapter_dir / "real.json")
    (adapter_dir / "adapter_config.json").symlink_to("real.json")
    assert set(use(adapter_dir).pairs) == set(SHAPES)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"identity": {"base_fingerprint": ["x"]}},
            r"run_config.json: identity.base_fingerprint is \['x'\], expected text",
        ),
        ({"identity": "x"}, "run_config.json: identity is 'x', expected an object"),
        ({"arguments": {"max_input_length": "512"}}, "arguments.max_input_length is '512', expected a whole number"),
        ({"arguments": {"prompt_text": 3}}, "arguments.prompt_text is 3, expected text"),
        ({"training_args": {"use_cpu": "no"}}, "training_args.use_cpu is 'no', expected true or false"),
        ({"arguments": {"prompt_text": "\ud800"}}, "run_config.json: .*surrogate"),
        ([], "expected a JSON object"),
    ],
)
def test_a_record_of_other_types(adapter_dir, record, message):
    (adapter_dir / "run_config.json").write_text(json.dumps(record), "utf-8")
    with pytest.raises(UserError, match=message):
        use(adapter_dir)


def test_a_record_of_another_program_is_not_read(adapter_dir):
    (adapter_dir / "run_config.json").write_text('{"data": null, "x": [1]}')
    assert read_training_record(adapter_dir) == {"data": None, "x": [1]}
    assert use(adapter_dir).run_config["x"] == [1]


def test_updates_without_a_base_can_be_put_on_a_model(adapter_dir):
    edit(adapter_dir, base_model_name_or_path=None)
    assert set(read_updates(adapter_dir).pairs) == set(SHAPES)
    with pytest.raises(UserError, match="base_model_name_or_path is None. Write the base"):
        read_adapter(adapter_dir)


# ---- a path given to the wrong flag


@pytest.fixture
def places(adapter_dir, tmp_path):
    """Directories that users give to the wrong flag, by what they hold."""

    def make(name, **files):
        (tmp_path / name).mkdir()
        for file_name, content in files.items():
            (tmp_path / name / file_name.replace("__", ".")).write_text(json.dumps(content))
        return tmp_path / name

    unfinished = make("run", run_config__json={"stage": "train_qlora"})
    for number in (9, 10):
        shutil.copytree(adapter_dir, unfinished / f"checkpoint-{number}")
    (unfinished / "checkpoint-200").mkdir()  # killed while it was saved
    return SimpleNamespace(
        adapter=adapter_dir,
        model=BASE_DIR,
        unfinished=unfinished,
        early=make("early", run_config__json={"stage": "train_qlora"}),
        glm=make(
            "glm", config__json={"model_type": "glm"}, run_config__json={"arguments": {"lora_path": "saved/mine"}}
        ),
        glm_adapter=make(
            "engine",
            adapter_config__json={"peft_type": "LORA"},
            run_config__json={"stage": "to_glm", "arguments": {"lora_path": "saved/mine"}},
        ),
        gguf=make("gguf", model__gguf="", run_config__json={"arguments": {"lora_path": "saved/mine"}}),
    )


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("model", "adapter_config.json is missing: not a LoRA adapter. It is a model: give it as --model_path {path}"),
        ("unfinished", "has not finished: .*--resume_from_checkpoint latest.*--lora_path {path}/checkpoint-10"),
        ("early", "interrupted before its first checkpoint"),
        ("glm", "AutoModelForCausalLM.from_pretrained.*give what it was made from: --lora_path saved/mine"),
        ("glm_adapter", "for engines such as vLLM. Here, give what it was made from: --lora_path saved/mine"),
        ("gguf", "llama-cli -m {path}/model.gguf.*--lora_path saved/mine"),
    ],
)
def test_what_is_no_adapter_says_what_would_work(places, place, message):
    path = getattr(places, place)
    with pytest.raises(UserError, match=message.format(path=re.escape(str(path)))):
        find_model(None, str(path))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("adapter", "a LoRA adapter. Give it as --lora_path {path}$"),
        ("unfinished", "has not finished: .*--resume_from_checkpoint latest.*--lora_path {path}/checkpoint-10"),
        ("glm", "AutoModelForCausalLM.from_pretrained.*give what it was made from: --lora_path saved/mine"),
        ("glm_adapter", "Here, give what it was made from: --lora_path saved/mine"),
        ("gguf", "llama-cli -m {path}/model.gguf"),
    ],
)
def test_what_is_no_model_says_what_would_work(places, place, message):
    path = getattr(places, place)
    with pytest.raises(UserError, match=message.format(path=re.escape(str(path)))):
        find_model(str(path), None)
    checkpoint = places.unfinished / "checkpoint-10"
    with pytest.raises(UserError, match=f"Give it as --lora_path {re.escape(str(checkpoint))}$"):
        find_model(str(checkpoint), None)
    assert find_model(None, str(checkpoint))[1].directory == checkpoint
    with pytest.raises(UserError, match="It is a file: give its directory"):
        find_model(str(BASE_DIR / "model.safetensors"), None)


# ---- model cards

NAMES = [
    "a|b",
    "x\n---\nlicense: mit\n---\n# y",
    "<img src=x>",
    "![x](http://y.z/q)",
    "\x1b[31m\u202e",
    "`a`",
    "- a: [b]",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_card_quotes_names_as_text(name):
    counts = {"num_rows": 1, "num_tokens": 1, "num_trained_tokens": 1}
    record = {
        "base": {"name": name, "family": "chatglm2-6b"},
        "arguments": {"train_data_path": name.replace("/", ""), "init_lora_path": name.replace("/", "")},
        "identity": {"init_lora_sha256": "0" * 64},
        "data": {"train": counts},
        "data_files": {"train": [{"path": name.replace("/", ""), "num_rows": 1, "num_used": 1, "share": None}]},
    }
    for card in (
        adapter_card(record, {"train_loss": 1.0, "kept_step": 1, "last_step": 2}, {"prompt_text": name}),
        merged_card(name, "fp16", {"family": name}, "Load it.", "transformers"),
    ):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]|(?<!\\)<img|(?<!\\)!\[|(?<!\\)`a`", card.split("---", 2)[2])
        assert card.count("\n---\n") == 1
        assert "\nlicense: mit" not in card.split("\n---\n")[0]
        assert "\n# y" not in card


def test_settings_without_a_file_adapt_nothing():
    assert AdapterConfig().is_adapted("x")
    assert AdapterConfig().ranks.get("x", 3) == 3
