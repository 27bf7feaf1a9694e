"""--init_lora_path: a new run goes on from the weights of an earlier adapter."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_qlora as stage
from glm_utils.adapter import read_adapter
from glm_utils.checkpoint import open_checkpoint
from glm_utils.cli import UserError
from glm_utils.family import FAMILIES
from glm_utils.load_model import ModelSource, find_model
from glm_utils.merging.job import make_job
from tests.conftest import FIXTURES_DIR
from tests.hostile_adapters import write_adapter

EXAMPLES = [
    {"content": f"类型#{kind}", "summary": f"{kind}，百搭又时尚。"} for kind in ("上衣", "裤子", "裙子", "外套")
]
ARGS = {
    "per_device_train_batch_size": 4,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
}


def run_stage(directory, name="out", args=None, **flags):
    """Run the stage on the test's data; return its output directory."""
    directory.mkdir(exist_ok=True)
    for file, values in (
        ("args.json", {**ARGS, "output_dir": str(directory / name), **(args or {})}),
        ("d.json", EXAMPLES),
    ):
        (directory / file).write_text(json.dumps(values, ensure_ascii=False), "utf-8")
    data = {"train_data_path": str(directory / "d.json")}
    stage.train_qlora(**{"train_args_json": str(directory / "args.json"), **data, **flags})
    return directory / name


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """An adapter of each family's golden model, with settings other than the defaults."""
    found = {}
    for family in FAMILIES:
        directory = tmp_path_factory.mktemp(family.name)
        flags = {
            "model_name_or_path": str(FIXTURES_DIR / family.name / "model"),
            "eval_data_path": str(directory / "d.json"),
        }
        flags |= {"lora_rank": 3, "lora_alpha": 12, "lora_targets": "query_key_value,dense", "lora_dropout": 0.0}
        found[family.name] = run_stage(directory, prompt_text="百搭", **flags)
    return found


@pytest.fixture
def adapter_dir(adapters, family_name):
    return adapters[family_name]


@pytest.fixture
def go_on(tmp_path, adapter_dir):
    """Go on from the family's adapter, in a directory of the test's own."""
    return lambda args=None, **flags: run_stage(tmp_path, args=args, **{"init_lora_path": str(adapter_dir), **flags})


@pytest.fixture
def copied(adapter_dir, tmp_path):
    """A copy of the adapter that may be damaged: a function that changes its settings and its weights."""
    target = shutil.copytree(adapter_dir, tmp_path / "copied")

    def change(weight=None, **settings):
        path, weights = target / "adapter_config.json", target / "adapter_model.safetensors"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | settings), "utf-8")
        if weight is not None:
            tensors = load_file(weights)
            next(iter(tensors.values()))[0, 0] = weight
            save_file(tensors, weights)
        return str(target)

    return change


def read_json(path):
    return json.loads(path.read_text("utf-8"))


def same_weights(first, second):
    first, second = (load_file(path / "adapter_model.safetensors") for path in (first, second))
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("form", ["output_dir", "checkpoint"])
def test_a_learning_rate_of_0_keeps_weights_and_loss(go_on, adapter_dir, form, family, tmp_path):
    source = adapter_dir if form == "output_dir" else adapter_dir / "checkpoint-2"
    out = go_on({"learning_rate": 0.0}, init_lora_path=str(source), eval_data_path=str(tmp_path / "d.json"))
    assert same_weights(out, adapter_dir)
    before, after = (read_json(path / "all_results.json") for path in (adapter_dir, out))
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-6)
    history = read_json(out / "trainer_state.json")["log_history"]
    losses = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    assert losses[1] == pytest.approx(before["eval_loss"], rel=1e-5)
    assert losses.keys() == {1, 2}  # steps are counted anew
    config = read_json(out / "adapter_config.json")
    kept = ("r", "lora_alpha", "lora_dropout", "target_modules", "base_model_name_or_path")
    assert {key: config[key] for key in kept} == {
        key: read_json(adapter_dir / "adapter_config.json")[key] for key in kept
    }
    record, digest = read_json(out / "run_config.json"), hashlib.sha256()
    digest.update((adapter_dir / "adapter_model.safetensors").read_bytes())
    assert record["arguments"]["init_lora_path"] == str(source)
    assert record["identity"]["init_lora_sha256"] == digest.hexdigest()
    assert (record["arguments"]["lora_rank"], record["arguments"]["prompt_text"]) == (3, "百搭")
    card = (out / "README.md").read_text("utf-8")
    assert f"Continued from the adapter {source.name}" in card.replace("\\", "")
    assert digest.hexdigest() in card


def test_the_result_is_an_adapter_like_any_other(go_on, adapter_dir):
    """It learns on, loads for chat on the base that it names, and merges."""
    out = go_on()
    assert not same_weights(out, adapter_dir)
    base, adapter = find_model(None, str(out))
    model = ModelSource("", base, adapter, False, torch.float32, torch.device("cpu")).load(merge_adapter=True)
    ids = torch.tensor([base.tokenizer.encode_prompt("百搭\n类型#裙子", [])])
    with torch.no_grad():
        assert model(input_ids=ids).logits.isfinite().all()
    job = make_job(adapter, base, 0, torch.device("cpu"), None, "original")
    name = f"{next(iter(adapter.pairs))}.weight"
    merged = job.merge_tensor(name)[name].float()
    assert torch.allclose(merged, model.state_dict()[name], rtol=1e-3, atol=1e-4)  # fp16


def test_ranks_scales_and_modules_of_other_tools_are_kept(tmp_path, model_dir, family):
    """Rank-stabilized LoRA, patterns, and an adapter on some layers only."""
    base = open_checkpoint(model_dir)
    path = "transformer.layers" if family.name == "chatglm-6b" else "transformer.encoder.layers"
    part = "attention" if family.name == "chatglm-6b" else "self_attention"
    model = base.classes.model(base.model_config)
    shapes = {
        f"{path}.1.{part}.{name}": tuple(model.get_submodule(f"{path}.1.{part}.{name}").weight.shape)
        for name in ("query_key_value", "dense")
    }
    source = write_adapter(tmp_path / "other", model_dir, shapes)
    tensors = load_file(source / "adapter_model.safetensors")
    grown = {
        key: torch.cat([value, value], int("lora_B" in key)) if ".dense." in key else value
        for key, value in tensors.items()
    }
    save_file(grown, source / "adapter_model.safetensors")
    config = read_json(source / "adapter_config.json")
    config |= {
        "use_rslora": True,
        "rank_pattern": {"dense": 4},
        "alpha_pattern": {"dense": 0.5},
        "layers_to_transform": [1],
    }
    (source / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    out = run_stage(tmp_path / "run", args={"learning_rate": 0.0}, init_lora_path=str(source))
    before, after = read_adapter(source), read_adapter(out)
    assert before.pairs.keys() == after.pairs.keys() == shapes.keys()
    for module, pair in before.pairs.items():
        assert torch.equal(pair.a, after.pairs[module].a)
        assert torch.equal(pair.b, after.pairs[module].b)
        assert pair.scale == pytest.approx(after.pairs[module].scale)


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora_rank": 8}, "--lora_rank 8: the adapter of --init_lora_path {dir} has 3. Leave the flag out"),
        ({"lora_alpha": 32}, "--lora_alpha 32: the adapter of --init_lora_path {dir} has 12"),
        (
            {"lora_targets": "all-linear"},
            "--lora_targets 'all-linear': the adapter of --init_lora_path {dir} has 'query",
        ),
        ({"prompt_text": "时尚"}, "--prompt_text '时尚': the adapter of --init_lora_path {dir} has '百搭'"),
        ({"prompt_text": ""}, "--prompt_text '': the adapter of --init_lora_path {dir} has '百搭'"),
        ({"lora_dropout": 1.0}, "--lora_dropout=1.0: expected 0 to below 1"),
        ({"init_lora_path": "none"}, "none: no such directory. Give the output_dir of a training run"),
        ({"init_lora_path": ""}, "not a LoRA adapter"),
        ({"model_name_or_path": str(FIXTURES_DIR / "chatglm-6b/model")}, "is not the base that {dir} was trained on"),
        (
            {"model_name_or_path": "{dir}"},
            "a LoRA adapter, not a base model. To train it further, give it as --init_lora_path",
        ),
    ],
)
def test_what_contradicts_the_adapter_is_refused(go_on, adapter_dir, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    flags = {name: value.format(dir=adapter_dir) if isinstance(value, str) else value for name, value in flags.items()}
    with pytest.raises(UserError) as error_info:
        go_on(**flags)
    assert message.format(dir=adapter_dir) in str(error_info.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_flags_that_agree_are_taken(go_on, model_dir):
    out = go_on(
        {"max_steps": 1},
        lora_rank=3,
        lora_alpha=12,
        lora_targets="dense,query_key_value",
        prompt_text="百搭",
        lora_dropout=0.5,
        model_name_or_path=str(model_dir),
    )
    assert read_json(out / "adapter_config.json")["lora_dropout"] == 0.5


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": float("nan")}, "holds NaN or infinite numbers"),
        ({"use_dora": True}, "use_dora True cannot be merged here"),
        ({"bias": "all"}, "bias 'all' cannot be merged here"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save ['lm_head'] cannot be merged here"),
        ({"r": 4}, "but adapter_config.json says rank 4"),
        ({"base_model_name_or_path": "/gone"}, "If it has moved, give its directory as --model_name_or_path"),
        ({"target_modules": ["query_key_value", "dense", "dense_h_to_4h"]}, "are missing. Copy the adapter again"),
    ],
)
def test_adapters_that_cannot_be_trained_further(go_on, copied, settings, message):
    with pytest.raises(UserError) as error_info:
        go_on(init_lora_path=copied(**settings))
    assert message in str(error_info.value)


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_a_checkpoint_with_noise_in_its_weights_is_refused(go_on, adapter_dir, tmp_path):
    """As long as a file is a checkpoint's own: what was deleted beside it does not matter."""
    source = shutil.copytree(adapter_dir / "checkpoint-1", tmp_path / "noisy")
    (source / "optimizer.pt").unlink()
    go_on({"max_steps": 1}, init_lora_path=str(source))
    path = source / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="adapter_model.safetensors: its content differs from manifest.json"):
        go_on({"output_dir": f"{source}-out"}, init_lora_path=str(source))


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_an_adapter_among_several_is_named(go_on, adapter_dir, tmp_path):
    shutil.copytree(adapter_dir, tmp_path / "several/default", ignore=shutil.ignore_patterns("checkpoint-*"))
    with pytest.raises(UserError, match=r"give one of them, --init_lora_path .*several/default"):
        go_on(init_lora_path=str(tmp_path / "several"))


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_what_the_run_begins_from_is_not_replaced(go_on, copied):
    source = copied()
    for init in (source, f"{source}/checkpoint-1"):
        with pytest.raises(UserError, match=r"is or holds the adapter of --init_lora_path"):
            go_on({"output_dir": source, "overwrite_output_dir": True}, init_lora_path=init)


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_a_resumed_run_names_the_same_adapter(go_on, adapter_dir, copied, model_dir, tmp_path):
    whole = go_on({"max_steps": 3, "output_dir": str(tmp_path / "whole")}).with_name("whole")
    out = go_on({"max_steps": 2})
    begun = {"lora_rank": 3, "lora_alpha": 12, "lora_targets": "query_key_value,dense", "lora_dropout": 0.0}
    begun |= {"prompt_text": "百搭", "model_name_or_path": str(model_dir), "init_lora_path": None}
    for flags in (begun, {"init_lora_path": copied(weight=0.5)}):
        with pytest.raises(UserError, match=r"init_lora_sha256 is .*Give --init_lora_path as the run did"):
            go_on({"max_steps": 3}, resume_from_checkpoint="latest", **flags)
    go_on({"max_steps": 3}, resume_from_checkpoint="latest")
    schedules = [read_json(path / "trainer_state.json")["log_history"][-1]["step"] for path in (whole, out)]
    assert schedules == [3, 3]
    with pytest.raises(UserError, match=r"init_lora_sha256 is null in the checkpoint and \"[0-9a-f]{64}\" now"):
        go_on(resume_from_checkpoint=str(adapter_dir / "checkpoint-1"))


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_hints_lead_to_the_flag(go_on, adapter_dir, model_dir, tmp_path):
    """Who wants to go on with new data meets one of these; none of them leads to another."""
    other = tmp_path / "other.json"
    other.write_text(json.dumps(EXAMPLES[:2]), "utf-8")
    same = {"init_lora_path": None, "lora_rank": 3, "lora_alpha": 12, "lora_targets": "query_key_value,dense"}
    same |= {"lora_dropout": 0.0, "prompt_text": "百搭", "model_name_or_path": str(model_dir)}
    checkpoint = adapter_dir / "checkpoint-2"
    for flags, named in (
        ({"resume_from_checkpoint": str(checkpoint), "train_data_path": str(other)}, checkpoint),
        ({"resume_from_checkpoint": str(checkpoint)}, checkpoint),
        ({"model_name_or_path": str(adapter_dir)}, adapter_dir),
    ):
        with pytest.raises(UserError, match=f"--init_lora_path {named}"):
            go_on(**{**same, **flags})
    bare = shutil.copytree(adapter_dir, tmp_path / "bare", ignore=shutil.ignore_patterns("checkpoint-*"))
    with pytest.raises(UserError, match=f"--init_lora_path {bare}"):
        go_on(**same, resume_from_checkpoint=str(bare))
