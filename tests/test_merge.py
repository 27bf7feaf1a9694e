"""merge_lora_and_quantize.py: the arithmetic against peft, the written directory, and every refusal."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import bitsandbytes
import peft
import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import merge_lora_and_quantize as stage
from glm_utils import files
from glm_utils.checkpoint import open_checkpoint
from glm_utils.cli import UserError, run_cli
from glm_utils.export import chatglm
from glm_utils.family import FAMILIES, PROJECT_DIR
from glm_utils.load_model import load_adapter, load_base_model
from glm_utils.merging import reload_check, shards
from glm_utils.merging.job import nf4_dtype
from glm_utils.merging.shards import TensorSpec, plan_shards
from glm_utils.model_files.checkpoint_files import fingerprint
from tests.conftest import write_quantized

PLAIN = {"r": 4, "lora_alpha": 8, "target_modules": ["query_key_value"]}
VARIED = {  # rsLoRA, all Linear modules, ranks and alphas by module
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "rank_pattern": {"dense_h_to_4h": 2, "layers.1.mlp.dense_4h_to_h": 3},
    "alpha_pattern": {"dense": 5},
    "use_rslora": True,
}
SCRIPTS = {path.name for path in FAMILIES[0].remote_dir.glob("*.py")}
FILES = SCRIPTS | {"README.md", "config.json", "generation_config.json", "model.safetensors"}
FILES |= {"run_config.json", "tokenizer_config.json"}


@pytest.fixture
def base_dir(model_dir, tmp_path):
    """A copy of the golden model in the published file layout, free to be broken."""
    target = tmp_path / "base"
    target.mkdir()
    for path in model_dir.iterdir():
        if "int4" not in path.name and "int8" not in path.name:
            shutil.copyfile(path, target / path.name)
    return target


@pytest.fixture
def adapter(base_dir, tmp_path):
    """Make an adapter for base_dir with random weights through peft; returns its directory."""

    def make(name="adapter", **settings):
        model = load_base_model(open_checkpoint(base_dir))
        model.name_or_path = str(base_dir)
        torch.manual_seed(0)
        config = peft.LoraConfig(**{**PLAIN, **settings}, init_lora_weights=False)
        peft.get_peft_model(model, config).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def merge(tmp_path, monkeypatch):
    """Run the stage on the CPU without the check in a fresh process; returns the output directory."""

    def run(adapter_dir, name="merged", verify=False, **flags):
        if not verify:
            monkeypatch.setattr(chatglm, "verify", lambda job, directory, reference: None)
        flags = {"qbits": 0, "device": "cpu", **flags}
        stage.merge_lora_and_quantize(lora_path=str(adapter_dir), output_path=str(tmp_path / name), **flags)
        return tmp_path / name

    return run


def _edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _digest(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def _merged_by_peft(base_dir, adapter_dir):
    """Return peft's merged weights in fp32, under the base's names."""
    model = load_adapter(load_base_model(open_checkpoint(base_dir)), adapter_dir).merge_and_unload()
    return model.state_dict()


# ---- the arithmetic


@pytest.mark.parametrize("settings", [PLAIN, VARIED], ids=["plain", "varied"])
def test_merged_weights_equal_peft(base_dir, adapter, merge, settings):
    adapter_dir = adapter(**settings)
    merged, expected = load_file(merge(adapter_dir) / "model.safetensors"), _merged_by_peft(base_dir, adapter_dir)
    base = load_file(base_dir / "model.safetensors")
    assert set(merged) == set(base)
    assert {tensor.dtype for tensor in merged.values()} == {torch.float16}
    num_changed = 0
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name].float(), tensor.float(), rtol=2**-10, atol=2**-24)
        num_changed += not torch.equal(merged[name], base[name].half())
    assert num_changed == 3 * len(settings["target_modules"])


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights_are_the_quantized_merged_weights(adapter, merge, family, bits):
    adapter_dir = adapter()
    fp16 = load_file(merge(adapter_dir, "fp16") / "model.safetensors")
    quantized_dir = merge(adapter_dir, "quantized", qbits=bits)
    quantized = load_file(quantized_dir / "model.safetensors")
    quantize_rows = get_class_from_dynamic_module("quantization.quantize_rows", str(family.remote_dir))
    num_linears = 0
    for name, tensor in fp16.items():
        if name.removesuffix(".weight").rpartition(".")[2] in family.linear_names and tensor.dim() == 2:
            stored, scale = quantize_rows(tensor, bits)
            assert torch.equal(quantized.pop(name), stored)
            assert torch.equal(quantized.pop(f"{name}_scale"), scale)
            num_linears += 1
        else:
            assert torch.equal(quantized.pop(name), tensor)
    assert num_linears == 12
    assert not quantized
    config = json.loads((quantized_dir / "config.json").read_text())
    assert config["quantization_bit"] == bits
    record = json.loads((quantized_dir / "run_config.json").read_text())
    assert 0 < record["report"]["relative_weight_error"] < (1e-4 if bits == 8 else 0.012)
    assert record["report"]["relative_weight_error"] < record["report"]["relative_weight_error_of_absmax"]
    assert set(record["report"]["by_module"]["relative_weight_error"]) == set(family.linear_names)
    assert {name: kind["num_layers"] for name, kind in record["report"]["by_module"]["update_norm"].items()} == {
        "query_key_value": 3
    }


def test_nf4_base_is_what_training_saw(base_dir, adapter, merge, log_lines):
    adapter_dir = adapter(target_modules=["query_key_value", "dense"])
    merged = load_file(merge(adapter_dir, merge_base="nf4") / "model.safetensors")
    model = load_adapter(
        load_base_model(open_checkpoint(base_dir), load_in_4bit=True, device_map={"": "cpu"}), adapter_dir
    )
    num_linears = 0
    for path, module in model.base_model.model.named_modules():
        linear = getattr(module, "base_layer", module)
        if path.endswith("base_layer") or not isinstance(linear, bitsandbytes.nn.Linear4bit):
            continue
        expected = bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
        if linear is not module:
            expected = expected + module.get_delta_weight("default")
        torch.testing.assert_close(merged[f"{path}.weight"].float(), expected, rtol=2**-10, atol=1e-6)
        num_linears += 1
    assert num_linears == 12
    text = "\n".join(log_lines)
    assert re.search(
        r"NF4 error \|W - NF4\(W\)\| / \|W\|: [\d.]+ to [\d.]+ \(\w+\), median [\d.]+ of 12 weights", text
    )
    assert re.search(r"update \|scale B A\| / \|W\|: [\d.]+ to [\d.]+ \((query_key_value|dense)\), median", text)
    assert "the NF4 weights are closer to training" in text
    assert "Merged into: the NF4 weights" in text


def test_nf4_dtype_is_that_of_the_training():
    assert nf4_dtype({}) == torch.float32
    assert nf4_dtype({"arguments": {"compute_dtype": "fp16"}}) == torch.float32
    assert nf4_dtype({"arguments": {"compute_dtype": "bf16"}, "training_args": {"use_cpu": False}}) == torch.bfloat16
    assert nf4_dtype({"arguments": {"compute_dtype": "bf16"}, "training_args": {"use_cpu": True}}) == torch.float32


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_sharded_bin_base(base_dir, adapter, merge, legacy):
    adapter_dir = adapter()
    expected = load_file(merge(adapter_dir, "expected") / "model.safetensors")
    weights = load_file(base_dir / "model.safetensors")
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file_name = f"pytorch_model-{number:05d}-of-00002.bin"
        part_weights = {name: weights[name] for name in part}
        torch.save(part_weights, base_dir / file_name, _use_new_zipfile_serialization=not legacy)
        weight_map.update(dict.fromkeys(part, file_name))
    (base_dir / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (base_dir / "model.safetensors").unlink()
    merged = load_file(merge(adapter_dir) / "model.safetensors")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_adapter_of_peft_0_4(adapter, merge):
    adapter_dir = adapter()
    expected = load_file(merge(adapter_dir, "expected") / "model.safetensors")
    weights = load_file(adapter_dir / "adapter_model.safetensors")
    torch.save(weights, adapter_dir / "adapter_model.bin")
    (adapter_dir / "adapter_model.safetensors").unlink()
    config = json.loads((adapter_dir / "adapter_config.json").read_text())
    old_keys = ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules", "bias", "task_type")
    (adapter_dir / "adapter_config.json").write_text(json.dumps({key: config[key] for key in old_keys}))
    merged = load_file(merge(adapter_dir) / "model.safetensors")
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_shards_hold_at_most_their_limit(tmp_path):
    tensors = {f"t{i}": torch.randn(3, 7 + i).half() for i in range(6)} | {"codes": torch.ones(3, 5, dtype=torch.int8)}
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    writer = shards.ShardWriter(tmp_path, specs, max_shard_bytes=130)
    with pytest.raises(RuntimeError, match="t0: found .* announced"):
        writer.write("t0", torch.zeros(1))
    for name in reversed(tensors):
        writer.write(name, tensors[name])
    writer.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(spec.num_bytes for spec in specs.values())
    assert set(index["weight_map"]) == set(tensors)
    for file_name in set(index["weight_map"].values()):
        part = load_file(tmp_path / file_name)
        assert sum(tensor.nbytes for tensor in part.values()) <= 130
        assert all(torch.equal(part[name], tensors[name]) for name in part)


def test_shard_plan():
    """As huggingface_hub plans shards, except that a tensor larger than a shard keeps its place in the order."""
    sizes = [30, 40, 70, 10, 65, 65, 1]
    tensors = {f"t{size}{i}": torch.ones(size, dtype=torch.int8) for i, size in enumerate(sizes)}
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    expected = split_torch_state_dict_into_shards(tensors, max_shard_size=130)
    assert plan_shards(specs, 130) == list(expected.filename_to_tensors.values())
    large = {"a": 60, "large": 200, "b": 60, "c": 60}
    specs = {name: TensorSpec(torch.int8, (size,)) for name, size in large.items()}
    assert plan_shards(specs, 130) == [["a"], ["large"], ["b", "c"]]


# ---- the written directory


def test_command_end_to_end(base_dir, adapter, family, tmp_path):
    adapter_dir = adapter()
    _edit(base_dir / "config.json", architectures=["ChatGLMModel"], _name_or_path="somewhere")
    before = {**_digest(base_dir), **_digest(adapter_dir)}
    out = tmp_path / "merged"
    command = [sys.executable, str(PROJECT_DIR / "merge_lora_and_quantize.py"), "--lora_path", str(adapter_dir)]
    done = subprocess.run([*command, "--output_path", str(out), "--device", "cpu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == FILES | {family.tokenizer_file}
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "merged"}
    last = done.stderr.strip().splitlines()[-1]
    num_bytes = sum(path.stat().st_size for path in out.iterdir())
    assert f"int4 model of {num_bytes:,} bytes in " in last
    assert last.endswith(f" s: {out}")
    assert "fresh process, AutoModel.from_pretrained" in done.stderr
    assert "squared relative weight error of the whole model" in done.stderr
    assert {**_digest(base_dir), **_digest(adapter_dir)} == before
    for path in family.remote_dir.glob("*.py"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert "_name_or_path" not in config
    assert config["architectures"] == ["ChatGLMModel"]
    assert (config["torch_dtype"], config["dtype"], config["quantization_bit"]) == ("float16", "float16", 4)
    assert "AutoModel.from_pretrained" in (out / "README.md").read_text(encoding="utf-8")
    script = (
        "import sys, transformers as t\n"
        "kwargs = {'trust_remote_code': True}\n"
        "tokenizer = t.AutoTokenizer.from_pretrained(sys.argv[1], **kwargs)\n"
        "t.AutoConfig.from_pretrained(sys.argv[1], **kwargs)\n"
        "for auto in (t.AutoModelForCausalLM, t.AutoModel):\n"
        "    model = auto.from_pretrained(sys.argv[1], **kwargs).half().eval()\n"
        "print(model.chat(tokenizer, '你好', history=[], max_length=40, do_sample=False)[1])\n"
    )
    chat = subprocess.run([sys.executable, "-c", script, str(out)], capture_output=True, text=True, cwd=tmp_path)
    assert chat.returncode == 0, chat.stderr
    assert "'你好'" in chat.stdout


def test_reload_of_large_models_agrees(adapter, merge, tokenizer):
    out = merge(adapter(), qbits=8)
    ids = tokenizer.encode_prompt("你好")
    form = reload_check.FORMS["published"]
    full = reload_check.full_logits(out, ids, "cpu", form)
    by_module = reload_check.by_module_logits(out, ids, "cpu", form)
    assert torch.equal(full, by_module)


def test_logits_in_memory_are_those_of_the_merged_model(base_dir, adapter, merge, monkeypatch):
    references = []
    write = chatglm.write
    monkeypatch.setattr(chatglm, "write", lambda *args: references.append(write(*args)) or references[0])
    adapter_dir = adapter()
    merge(adapter_dir)
    model = load_adapter(load_base_model(open_checkpoint(base_dir)), adapter_dir).merge_and_unload().eval()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([references[0].input_ids])).logits[0]
    torch.testing.assert_close(references[0].logits, expected, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_a_directory_that_computes_something_else_is_refused(adapter, merge, monkeypatch, tmp_path):
    write = chatglm.write

    def write_and_break(job, directory):
        reference = write(job, directory)
        weights = load_file(directory / "model.safetensors")
        name = next(name for name in weights if name.endswith("1.mlp.dense_4h_to_h.weight"))
        weights[name] = -weights[name]
        save_file(weights, directory / "model.safetensors", {"format": "pt"})
        return reference

    monkeypatch.setattr(chatglm, "write", write_and_break)
    with pytest.raises(UserError, match="the written model differs"):
        merge(adapter(), verify=True)
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".merged*"))


# ---- bad input


def test_output_that_is_not_empty(adapter, merge, tmp_path):
    adapter_dir = adapter()
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty. Give another directory, or --overwrite"):
        merge(adapter_dir)
    with pytest.raises(UserError, match="replaces an earlier output of merge_lora_and_quantize only"):
        merge(adapter_dir, overwrite=True)
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["mine.txt"]
    (tmp_path / "merged" / "mine.txt").unlink()
    out = merge(adapter_dir)
    (out / "old.txt").write_text("goes")
    merge(adapter_dir, qbits=8, overwrite=True)
    assert not (out / "old.txt").exists()
    assert json.loads((out / "config.json").read_text())["quantization_bit"] == 8


def test_output_inside_the_inputs(adapter, merge, base_dir):
    adapter_dir = adapter()
    for name in ("base", "base/merged", "adapter", "."):
        with pytest.raises(UserError, match="overlaps the input"):
            merge(adapter_dir, name, overwrite=True)
    assert (base_dir / "model.safetensors").is_file()


@pytest.mark.parametrize("qbits", [3, 16, -4])
def test_other_bits(merge, tmp_path, qbits):
    with pytest.raises(UserError, match=f"--qbits {qbits}: expected 0 .fp16., 8 or 4"):
        merge(tmp_path, qbits=qbits)


@pytest.mark.parametrize("device", ["gpu", "cuda:7", "meta"])
def test_other_devices(adapter, merge, device):
    with pytest.raises(UserError, match=f"--device {device}"):
        merge(adapter(), device=device)


def test_base_that_cannot_be_found(adapter, merge, base_dir, tmp_path):
    adapter_dir = adapter()
    base_dir.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="cannot be opened.*no such directory.*base_model_name_or_path"):
        merge(adapter_dir)


def test_base_of_another_family(adapter, merge, family):
    adapter_dir = adapter()
    other = next(known for known in FAMILIES if known != family)
    other_base = PROJECT_DIR / "tests" / "fixtures" / other.name / "model"
    _edit(adapter_dir / "adapter_config.json", base_model_name_or_path=str(other_base))
    with pytest.raises(UserError, match="does not fit.*the base has no Linear.*another family"):
        merge(adapter_dir)


def test_base_of_another_size(adapter, merge):
    adapter_dir = adapter()
    weights = load_file(adapter_dir / "adapter_model.safetensors")
    save_file(
        {name: tensor[..., :-2].contiguous() for name, tensor in weights.items() if "lora_A" in name}
        | {name: tensor for name, tensor in weights.items() if "lora_B" in name},
        adapter_dir / "adapter_model.safetensors",
    )
    with pytest.raises(UserError, match=r"query_key_value is \[\d+, 64\], the adapter updates \[\d+, 62\]"):
        merge(adapter_dir)


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_base_that_is_not_computed(adapter, merge, base_dir):
    adapter_dir, path = adapter(), base_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rmsnorm": False}))
    with pytest.raises(UserError, match=r"config\.json: rmsnorm=False is not supported"):
        merge(adapter_dir)


def test_base_that_changed_since_training(adapter, merge, base_dir):
    adapter_dir = adapter()
    record = {"identity": {"base_fingerprint": fingerprint(base_dir)}}
    (adapter_dir / "run_config.json").write_text(json.dumps(record))
    merge(adapter_dir, "first")
    weights = load_file(base_dir / "model.safetensors")
    save_file({name: -tensor for name, tensor in weights.items()}, base_dir / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="is not the base that .* was trained on.*Restore that revision"):
        merge(adapter_dir)


def test_quantized_base(adapter, merge, base_dir, tmp_path):
    adapter_dir = adapter()
    write_quantized(base_dir, tmp_path / "int4")
    shutil.rmtree(base_dir)
    (tmp_path / "int4").rename(base_dir)
    with pytest.raises(
        UserError, match="quantized already.*cannot be added to integer weights.*Give the fp16 checkpoint"
    ):
        merge(adapter_dir)


def test_base_with_missing_weights(adapter, merge, base_dir):
    adapter_dir = adapter()
    weights = load_file(base_dir / "model.safetensors")
    name = next(name for name in weights if name.endswith("final_layernorm.weight"))
    save_file({key: tensor for key, tensor in weights.items() if key != name}, base_dir / "model.safetensors")
    with pytest.raises(UserError, match="1 missing weights, e.g. .*final_layernorm.weight"):
        merge(adapter_dir)
    weights[name] = weights[name][:-1].contiguous()
    save_file(weights, base_dir / "model.safetensors")
    with pytest.raises(UserError, match=r"final_layernorm.weight is \[63\], its config.json implies \[64\]"):
        merge(adapter_dir)


def test_base_with_weights_that_no_module_has(adapter, merge, base_dir):
    adapter_dir = adapter()
    weights = load_file(base_dir / "model.safetensors")
    save_file({**weights, "transformer.extra.weight": torch.zeros(1)}, base_dir / "model.safetensors")
    with pytest.raises(UserError, match="1 unexpected weights, e.g. transformer.extra.weight"):
        merge(adapter_dir)


@pytest.mark.parametrize("bits", [0, 8])
def test_base_without_rope_frequencies(adapter, merge, base_dir, bits, tokenizer):
    """The models compute them: training takes such a base, so the merge does."""
    adapter_dir = adapter()
    weights = load_file(base_dir / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.endswith("inv_freq")}
    assert len(kept) < len(weights)
    with_them = load_file(merge(adapter_dir, "with", qbits=bits) / "model.safetensors")
    save_file(kept, base_dir / "model.safetensors", {"format": "pt"})
    load_base_model(open_checkpoint(base_dir))
    out = merge(adapter_dir, "without", qbits=bits)
    without = load_file(out / "model.safetensors")
    assert with_them.keys() - without.keys() == weights.keys() - kept.keys()
    assert all(torch.equal(with_them[name], tensor) for name, tensor in without.items())
    ids, form = tokenizer.encode_prompt("你好"), reload_check.FORMS["published"]
    expected = reload_check.full_logits(out.with_name("with"), ids, "cpu", form)
    for logits in (reload_check.full_logits, reload_check.by_module_logits):
        assert torch.equal(logits(out, ids, "cpu", form), expected)


@pytest.mark.parametrize("kind", [torch.nan, torch.inf, 1e6])
def test_weights_that_fp16_does_not_hold(adapter, merge, base_dir, tmp_path, kind):
    adapter_dir = adapter()
    weights = load_file(base_dir / "model.safetensors")
    name = next(name for name in weights if name.endswith("0.mlp.dense_4h_to_h.weight"))
    weights[name] = weights[name].float()
    weights[name][0, 0] = kind
    save_file(weights, base_dir / "model.safetensors")
    with pytest.raises(UserError, match="0.mlp.dense_4h_to_h.weight: values from .* expected finite numbers"):
        merge(adapter_dir)
    assert not list(tmp_path.glob(".merged*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora True cannot be merged here. Merge it with peft"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias 'all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base weights before training"),
        ({"peft_type": "PREFIX_TUNING"}, "peft_type is 'PREFIX_TUNING'"),
        ({"revision": "v1.0"}, "--revision v1.0"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is None"),
        ({"r": 8}, "adapter_config.json says rank 8"),
    ],
)
def test_adapters_that_cannot_be_merged(adapter, merge, changes, message):
    adapter_dir = adapter()
    _edit(adapter_dir / "adapter_config.json", **changes)
    with pytest.raises(UserError, match=message):
        merge(adapter_dir)


def test_broken_adapter_weights(adapter, merge):
    adapter_dir = adapter()
    path = adapter_dir / "adapter_model.safetensors"
    weights = load_file(path)
    first = sorted(weights)[0]
    for change, message in [
        ({first: torch.full_like(weights[first], torch.nan)}, "holds NaN"),
        ({"base_model.model.x.lora_magnitude_vector": torch.ones(2)}, "is not a LoRA matrix of a Linear"),
        ({first: None}, "has only lora_B"),
    ]:
        changed = {name: tensor for name, tensor in {**weights, **change}.items() if tensor is not None}
        save_file(changed, path)
        with pytest.raises(UserError, match=message):
            merge(adapter_dir)
    with pytest.raises(UserError, match="no such directory. Give the output_dir of a training"):
        merge(adapter_dir.with_name("absent"))


def test_remote_scripts_of_another_family(adapter, merge, family, tmp_path):
    adapter_dir = adapter()
    other = next(known for known in FAMILIES if known != family)
    with pytest.raises(UserError, match=f"scripts of {other.title}, the base model is {family.title}"):
        merge(adapter_dir, remote_scripts_dir=str(other.remote_dir))
    with pytest.raises(UserError, match=f"{min(SCRIPTS)} is missing"):
        merge(adapter_dir, remote_scripts_dir=str(tmp_path))
    copy = tmp_path / "scripts"
    shutil.copytree(family.remote_dir, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "quantization.py").write_text((copy / "quantization.py").read_text() + "# changed\n")
    out = merge(adapter_dir, remote_scripts_dir=str(copy))
    assert (out / "quantization.py").read_text().endswith("# changed\n")


def test_disk_that_fills_up(adapter, merge, monkeypatch, tmp_path):
    adapter_dir = adapter()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="0.00 GB free, 0.02 GB needed"):
        merge(adapter_dir)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    pwrite, count = os.pwrite, []

    def full(file, data, offset):
        count.append(1)
        if len(count) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(file, data, offset)

    monkeypatch.setattr(shards.os, "pwrite", full)
    with pytest.raises(UserError, match="the disk is full"):
        merge(adapter_dir)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


@pytest.mark.parametrize(("family_name", "where"), [("chatglm-6b", "weights"), ("chatglm2-6b", "rename")])
def test_a_kill_leaves_nothing_that_loads(adapter, merge, tmp_path, where, log_lines):
    adapter_dir, out = adapter(), tmp_path / "merged"
    patch = {
        "weights": "n=[]; w=shards.ShardWriter.write\n"
        "shards.ShardWriter.write=lambda *a: (n.append(1), len(n)>9 and os.kill(os.getpid(),9), w(*a))",
        "rename": "output_dir.put_in_place=lambda *a: os.kill(os.getpid(),9)",
    }[where]
    script = (
        "import os, sys\nimport merge_lora_and_quantize as stage\n"
        "from glm_utils import output_dir\nfrom glm_utils.export import chatglm\n"
        "from glm_utils.merging import shards\n"
        "chatglm.verify=lambda *a: None\n"
        f"{patch}\nstage.merge_lora_and_quantize(lora_path=sys.argv[1], output_path=sys.argv[2], device='cpu')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT_DIR), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", script, str(adapter_dir), str(out)]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    leftover = tmp_path / ".merged.incomplete"
    assert (leftover / "config.json").exists() == (where == "rename")  # complete, but for its name
    merge(adapter_dir)
    assert not list(tmp_path.glob(".merged*"))
    assert any("left by a run that was killed" in line for line in log_lines)


@pytest.mark.slow
def test_comparison_behind_a_merge(merge, tmp_path):
    """--evaluate_data_path reports what merging to int4 changed against the adapter on its base."""
    base = open_checkpoint(PROJECT_DIR / "models/chatglm2-tiny")
    model = load_base_model(base)
    model.name_or_path = base.name
    torch.manual_seed(0)
    peft.get_peft_model(model, peft.LoraConfig(**PLAIN)).save_pretrained(tmp_path / "adapter")
    lines = (PROJECT_DIR / "data/dev.jsonl").read_text("utf-8").splitlines()[:3]
    (tmp_path / "dev.jsonl").write_text("\n".join(lines), "utf-8")
    merge(tmp_path / "adapter", qbits=4, evaluate_data_path=str(tmp_path / "dev.jsonl"))
    report = json.loads((tmp_path / "merged_evaluation/report.json").read_text("utf-8"))
    assert report["num_examples"] == 3
    losses = report["figures"]["loss"]
    assert losses["after"] != losses["before"]
    assert losses["after"] == pytest.approx(losses["before"], rel=0.2)  # int4 is near, and not the same


def test_a_comparison_is_checked_before_the_merge(adapter, merge, tmp_path):
    data_path = str(PROJECT_DIR / "data/dev.jsonl")
    for flags, message in (
        ({"evaluate_data_path": "none.jsonl"}, "none.jsonl: no such file"),
        ({"evaluate_data_path": data_path, "export_format": "glm"}, "the published layout only"),
    ):
        with pytest.raises(UserError, match=message):
            merge(adapter(), **flags)
    assert not (tmp_path / "merged").exists()


def test_flags_and_unknown_flags(capsys):
    with pytest.raises(SystemExit):
        run_cli(stage.merge_lora_and_quantize, ["--lora_path=a", "--output_path=b", "--qbit=4"])
    assert "Did you mean --qbits?" in capsys.readouterr().err
    for flag, value in (("--merge_base", "fp8"), ("--export_format", "onnx"), ("--qbits", "four")):
        with pytest.raises(SystemExit):
            run_cli(stage.merge_lora_and_quantize, ["--lora_path=a", "--output_path=b", f"{flag}={value}"])
        assert f"{flag}={value}: expected" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [0, 8, 4])
def test_gpu_merges_as_the_cpu_does(adapter, merge, bits):
    adapter_dir = adapter()
    on_cpu = load_file(merge(adapter_dir, "cpu") / "model.safetensors")
    on_gpu = load_file(merge(adapter_dir, "gpu", qbits=bits, device="cuda:0", verify=True) / "model.safetensors")
    assert bits or all(torch.equal(on_cpu[name], on_gpu[name]) for name in on_cpu)
