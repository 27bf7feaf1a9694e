"""Checkpoints: what is refused and why, that foreign code never runs, and the bitsandbytes trap on CPUs."""

import io
import json
import shutil
import subprocess
import sys

import bitsandbytes
import huggingface_hub
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils.logging import is_progress_bar_enabled

from glm_utils import loading_bar
from glm_utils.checkpoint import find_checkpoint_dir, load_classes, open_checkpoint
from glm_utils.cli import UserError
from glm_utils.family import FAMILIES, PROJECT_DIR, detect_family, resolve_lora_targets
from glm_utils.load_model import load_adapter, load_base_model
from glm_utils.model_files.checkpoint_files import fingerprint
from glm_utils.nf4_layers import keep_4bit_layout

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234\n"


@pytest.fixture
def base_dir(model_dir, family, tmp_path):
    """A copy of the golden model that a test may damage."""
    target = tmp_path / "base"
    target.mkdir()
    for name in ("config.json", "tokenizer_config.json", "model.safetensors", family.tokenizer_file):
        shutil.copyfile(model_dir / name, target / name)
    return target


def edit_config(base_dir, **changes):
    path = base_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def to_shards(base_dir, num_shards=2):
    """Rewrite the weights in the published layout: sharded .bin files with an index."""
    state = load_file(base_dir / "model.safetensors")
    (base_dir / "model.safetensors").unlink()
    weight_map = {}
    for shard in range(num_shards):
        name = f"pytorch_model-{shard + 1:05d}-of-{num_shards:05d}.bin"
        part = {key: tensor for index, (key, tensor) in enumerate(state.items()) if index % num_shards == shard}
        torch.save(part, base_dir / name)
        weight_map.update(dict.fromkeys(part, name))
    (base_dir / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# ---- families


def test_families_are_told_apart_by_their_config(model_dir, family):
    assert detect_family(json.loads((model_dir / "config.json").read_text()), model_dir) is family
    assert {"configuration_chatglm.py", "modeling_chatglm.py", "tokenization_chatglm.py", "quantization.py"} <= {
        path.name for path in family.remote_dir.iterdir()
    }


@pytest.mark.parametrize("config", [{}, {"model_type": "llama", "ffn_hidden_size": 1}, {"model_type": "chatglm"}])
def test_unknown_families_are_refused_with_the_known_ones(config):
    with pytest.raises(UserError, match=r"x/config.json: unknown model family.*ChatGLM-6B.*ChatGLM2-6B"):
        detect_family(config, "x/config.json")


def test_lora_targets():
    family = FAMILIES[0]
    assert resolve_lora_targets(family, "query_key_value") == ["query_key_value"]
    assert resolve_lora_targets(family, "dense, query_key_value") == ["query_key_value", "dense"]
    assert resolve_lora_targets(family, ["dense", "dense"]) == ["dense"]
    assert resolve_lora_targets(family, "all-linear") == list(family.linear_names)
    for wrong, message in (
        ("query_key", "Did you mean query_key_value?"),
        ("q_proj", "no module 'q_proj'"),
        ("", "empty"),
    ):
        with pytest.raises(UserError) as error_info:
            resolve_lora_targets(family, wrong)
        assert message in str(error_info.value)


# ---- where the model is


def test_a_local_directory_is_taken_before_the_hub(base_dir, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    assert find_checkpoint_dir(str(base_dir)) == base_dir


def test_shipped_directories_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint_dir("remote_scripts/chatglm-6b") == PROJECT_DIR / "remote_scripts" / "chatglm-6b"


@pytest.mark.parametrize("hub_id", [hub_id for family in FAMILIES for hub_id in family.hub_ids])
@pytest.mark.parametrize("with_safetensors", [True, False])
def test_the_hub_gives_data_files_only(hub_id, with_safetensors, monkeypatch, tmp_path):
    names = ["config.json", "modeling_chatglm.py", "tokenizer.model", "pytorch_model-00001-of-00007.bin", "README.md"]
    names += ["model-00001-of-00007.safetensors"] if with_safetensors else []

    def download(repo_id, allow_patterns, ignore_patterns):
        wanted = huggingface_hub.utils.filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        weights = names[5] if with_safetensors else names[3]
        assert repo_id == hub_id
        assert sorted(wanted) == sorted(["config.json", "tokenizer.model", weights])
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo_id: names)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_checkpoint_dir(hub_id) == tmp_path


def test_a_network_that_fails_in_its_own_way_names_the_remedy(monkeypatch):
    """What huggingface_hub lets through depends on its HTTP library."""

    class ConnectError(Exception):
        pass

    def fail(*args, **kwargs):
        raise ConnectError

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"could not be downloaded \(ConnectError: \).*give its directory"):
        find_checkpoint_dir("THUDM/chatglm2-6b")


def test_offline_names_the_remedy():
    with pytest.raises(UserError, match=r"could not be downloaded.*give its directory.*hf download THUDM"):
        find_checkpoint_dir("THUDM/chatglm2-6b")


@pytest.mark.parametrize("name", ["/no/such/dir", "./nothing", "tests/nothing", "nothing"])
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(name, monkeypatch):
    monkeypatch.chdir(PROJECT_DIR)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match="no such directory"):
        find_checkpoint_dir(name)


# ---- what is refused


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "no config": (lambda d, f: (d / "config.json").unlink(), "config.json is missing: not a model directory"),
    "broken config": (lambda d, f: (d / "config.json").write_text('{\n"a": }'), "config.json:2: broken JSON"),
    "nested config": (lambda d, f: (d / "config.json").write_text("[" * 100_000), "config.json:1: broken JSON"),
    "config is a pointer": (lambda d, f: (d / "config.json").write_text(LFS_POINTER), "Git LFS pointer"),
    "config is a list": (lambda d, f: (d / "config.json").write_text("[]"), "expected a JSON object"),
    "other family": (lambda d, f: (d / "config.json").write_text('{"model_type": "llama"}'), "unknown model family"),
    "prefix tuning": (lambda d, f: edit_config(d, pre_seq_len=128), "P-tuning"),
    "no weights": (lambda d, f: (d / "model.safetensors").unlink(), "no weights"),
    "weights are a pointer": (lambda d, f: (d / "model.safetensors").write_text(LFS_POINTER), "git lfs pull"),
    "weights are empty": (lambda d, f: (d / "model.safetensors").write_text(""), "empty file"),
    "weights are truncated": (lambda d, f: truncate(d / "model.safetensors"), "truncated safetensors file"),
    "weights are truncated in the header": (
        lambda d, f: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:50]),
        "truncated safetensors file",
    ),
    "weights are noise": (
        lambda d, f: (d / "model.safetensors").write_bytes(b"\xff" * 99),
        "broken or truncated safetensors file",
    ),
    "no vocabulary": (lambda d, f: (d / f.tokenizer_file).unlink(), "no such file"),
    "vocabulary is a pointer": (lambda d, f: (d / f.tokenizer_file).write_text(LFS_POINTER), "Git LFS pointer"),
    "missing shard": (
        lambda d, f: (to_shards(d), (d / "pytorch_model-00002-of-00002.bin").unlink()),
        "pytorch_model-00002-of-00002.bin: no such file",
    ),
    "truncated shard": (lambda d, f: (to_shards(d), truncate(d / "pytorch_model-00001-of-00002.bin")), "truncated"),
    "shard is a pointer": (
        lambda d, f: (to_shards(d), (d / "pytorch_model-00001-of-00002.bin").write_text(LFS_POINTER)),
        "Git LFS pointer",
    ),
    "empty index": (
        lambda d, f: (to_shards(d), (d / "pytorch_model.bin.index.json").write_text("{}")),
        "weight_map is missing or empty",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused_with_a_remedy(base_dir, family, damage):
    change, message = DAMAGES[damage]
    open_checkpoint(base_dir)
    change(base_dir, family)
    with pytest.raises(UserError) as error_info:
        open_checkpoint(base_dir)
    assert str(error_info.value).startswith(str(base_dir))
    assert message in str(error_info.value)


def test_an_adapter_given_as_base_is_refused_with_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "THUDM/chatglm2-6b"}')
    with pytest.raises(UserError, match=r"a LoRA adapter, not a base model. Give its base: 'THUDM/chatglm2-6b'"):
        open_checkpoint(tmp_path)


def test_a_broken_vocabulary_is_a_user_error(base_dir, family):
    (base_dir / family.tokenizer_file).write_bytes(b"noise" * 10)
    with pytest.raises(UserError, match=family.tokenizer_file):
        open_checkpoint(base_dir).tokenizer.encode_prompt("你好")


def test_fingerprint_changes_with_config_and_weights(base_dir):
    before = fingerprint(base_dir)
    assert fingerprint(base_dir) == before
    edit_config(base_dir, torch_dtype="float16")
    after = fingerprint(base_dir)
    assert after != before
    to_shards(base_dir)
    assert fingerprint(base_dir) not in (before, after)


# ---- loading


def test_published_shards_load_as_safetensors_do(base_dir):
    expected = load_base_model(open_checkpoint(base_dir)).state_dict()
    to_shards(base_dir)
    found = load_base_model(open_checkpoint(base_dir)).state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("kind", ["missing", "mismatched", "unexpected"])
def test_weights_that_are_not_those_of_the_config_are_refused(base_dir, kind, load_in_4bit):
    """Transformers only warns; then a missing weight gives NaN logits, and an unexpected one a wrong model."""
    state = load_file(base_dir / "model.safetensors")
    name = next(key for key in state if key.endswith("layers.1.mlp.dense_4h_to_h.weight"))
    if kind == "missing":
        del state[name]
    elif kind == "mismatched":
        state[name] = state[name][:-32].contiguous()
    else:
        name = name.replace("layers.1.", "layers.9.")
        state[name] = torch.zeros(2, 2)
    save_file(state, base_dir / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"1 {kind} weights, e.g. .*{name}"):
        load_base_model(open_checkpoint(base_dir), load_in_4bit=load_in_4bit)


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_a_config_that_is_not_computed_is_a_user_error(base_dir):
    path = base_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_ratio": 50}))
    with pytest.raises(UserError, match=r"config\.json: rope_ratio=50 is not supported"):
        load_base_model(open_checkpoint(base_dir))


def test_the_rotary_buffer_may_be_absent(base_dir):
    """Checkpoints that other tools wrote often lack inv_freq, which is computed anyway."""
    state = load_file(base_dir / "model.safetensors")
    kept = {key: value for key, value in state.items() if not key.endswith("inv_freq")}
    assert len(kept) < len(state)
    complete = load_base_model(open_checkpoint(base_dir))
    save_file(kept, base_dir / "model.safetensors", {"format": "pt"})
    bare = load_base_model(open_checkpoint(base_dir))
    for (name, a), b in zip(complete.state_dict().items(), bare.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_code_beside_a_checkpoint_is_never_run(base_dir):
    trap = "raise RuntimeError('code of the checkpoint was executed')\n"
    names = ("configuration_chatglm", "modeling_chatglm", "tokenization_chatglm", "quantization")
    for name in names:
        (base_dir / f"{name}.py").write_text(trap)
    auto_map = {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    }
    edit_config(base_dir, auto_map=auto_map)
    path = base_dir / "tokenizer_config.json"
    tokenizer_map = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": tokenizer_map}))
    to_shards(base_dir)
    tokenizer = open_checkpoint(base_dir).tokenizer
    for load_in_4bit in (False, True):
        model = load_base_model(open_checkpoint(base_dir), load_in_4bit=load_in_4bit)
        ids = torch.tensor([tokenizer.encode_prompt("你好")])
        assert model(input_ids=ids).logits.isfinite().all()


def test_four_bit_loading_quantizes_the_layers_only(model_dir, family):
    model = load_base_model(open_checkpoint(model_dir), load_in_4bit=True, compute_dtype="fp32")
    quantized = [name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    plain = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    assert {name.rsplit(".", 1)[1] for name in quantized} == set(family.linear_names)
    assert len(quantized) == 4 * model.config.num_hidden_layers
    assert len(plain) == 1
    assert plain[0].endswith(("lm_head", "output_layer"))
    state = model.get_submodule(quantized[0]).weight.quant_state
    assert (state.quant_type, state.nested) == ("nf4", True)
    assert model.get_output_embeddings().weight.dtype == torch.float32


# ---- the bitsandbytes trap


def lora_model(model_dir, seed=0):
    torch.manual_seed(seed)
    model = load_base_model(open_checkpoint(model_dir), load_in_4bit=True)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["query_key_value"], init_lora_weights=False)
    )
    return model


def gradients(model, ids):
    model.train()
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


def dequantized(model):
    return {
        name: bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }


@pytest.mark.parametrize("avx512", [True, False], ids=["cpu with avx512_bf16", "cpu without"])
def test_train_evaluate_train_merge_on_a_cpu(model_dir, tokenizer, monkeypatch, avx512):
    if not avx512:
        monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    model = lora_model(model_dir)
    ids = torch.tensor([tokenizer.encode_prompt("类型#上衣") + tokenizer.encode_answer("白色上衣")])
    weights, before = dequantized(model), gradients(model, ids)
    with torch.no_grad():
        model.eval()
        logits = model(input_ids=ids).logits
        model.train()
    after = gradients(model, ids)
    assert all(gradient.abs().sum() > 0 for gradient in before.values())
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(torch.equal(weight, weights[name]) for name, weight in dequantized(model).items())
    merged = load_base_model(open_checkpoint(model_dir))
    for name, weight in weights.items():
        linear = merged.get_submodule(name.removeprefix("base_model.model.").removesuffix(".base_layer"))
        linear.weight.data = weight.float()
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            merged.get_submodule(name.removeprefix("base_model.model.")).weight.data += module.get_delta_weight(
                "default"
            )
    with torch.no_grad():
        assert (merged.eval()(input_ids=ids).logits - logits).abs().max() < 1e-4


def test_the_trap_is_real_where_the_cpu_has_it(model_dir, tokenizer):
    """Without the remedy an evaluation repacks the weights; if this fails, bitsandbytes has fixed it."""
    if not bitsandbytes.nn.modules.has_avx512bf16():
        pytest.skip("this CPU has no avx512_bf16")
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer = layer.to("cpu").eval()
    with torch.no_grad():
        layer(torch.randn(2, 64))
    assert layer.weight.quant_state.packing_format_for_cpu
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    keep_4bit_layout(layer)
    with torch.no_grad():
        layer.to("cpu").eval()(torch.randn(2, 64))
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


# ---- adapters


def old_adapter(model_dir, target):
    """Write an adapter as peft 0.4 did: adapter_model.bin, and the config keys of that time."""
    model = lora_model(model_dir)
    state = peft.get_peft_model_state_dict(model)
    target.mkdir()
    torch.save(state, target / "adapter_model.bin")
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": "THUDM/chatglm2-6b",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "revision": None,
        "target_modules": ["query_key_value"],
        "task_type": "CAUSAL_LM",
    }
    (target / "adapter_config.json").write_text(json.dumps(config))
    return model


def test_the_bar_of_loading_is_for_those_who_wait(model_dir, monkeypatch):
    """None while a small model is loaded or where nobody watches; it stays as it was for other programs."""
    shown = {}
    for is_terminal, min_bytes in ((False, 0), (True, 10**9), (True, 0)):
        screen = io.StringIO()
        screen.isatty = lambda is_terminal=is_terminal: is_terminal
        monkeypatch.setattr("sys.stderr", screen)
        monkeypatch.setattr(loading_bar, "MIN_BYTES", min_bytes)
        load_base_model(open_checkpoint(model_dir))
        shown[is_terminal, min_bytes] = "Loading weights" in screen.getvalue()
        assert is_progress_bar_enabled()
    assert shown == {(False, 0): False, (True, 10**9): False, (True, 0): True}


def test_adapters_of_the_original_project_load(model_dir, tokenizer, tmp_path):
    expected = old_adapter(model_dir, tmp_path / "adapter").eval()
    found = load_adapter(load_base_model(open_checkpoint(model_dir), load_in_4bit=True), tmp_path / "adapter").eval()
    ids = torch.tensor([tokenizer.encode_prompt("你好")])
    with torch.no_grad():
        assert torch.equal(found(input_ids=ids).logits, expected(input_ids=ids).logits)
        with found.disable_adapter():
            assert not torch.allclose(found(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_an_adapter_with_code_in_its_bin_is_not_executed(model_dir, tmp_path):
    old_adapter(model_dir, tmp_path / "adapter")

    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("code of the adapter was executed",))

    torch.save({"x": Trap()}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(UserError, match="only tensors are read"):
        load_adapter(load_base_model(open_checkpoint(model_dir)), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "adapter_config.json").unlink(), "not a LoRA adapter"),
        (lambda d: (d / "adapter_model.bin").unlink(), "no adapter_model.safetensors or adapter_model.bin"),
        (lambda d: truncate(d / "adapter_model.bin"), "truncated"),
        (lambda d: (d / "adapter_model.bin").write_text(LFS_POINTER), "Git LFS pointer"),
        (lambda d: (d / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}'), "expected 'LORA'"),
    ],
)
def test_damaged_adapters_are_refused(golden_model, model_dir, tmp_path, change, message):
    old_adapter(model_dir, tmp_path / "adapter")
    change(tmp_path / "adapter")
    with pytest.raises(UserError, match=message):
        load_adapter(golden_model, tmp_path / "adapter")


def test_an_adapter_of_another_shape_is_refused(golden_model, model_dir, tmp_path):
    adapter_dir = tmp_path / "adapter"
    old_adapter(model_dir, adapter_dir)
    state = torch.load(adapter_dir / "adapter_model.bin", weights_only=True)
    (adapter_dir / "adapter_model.bin").unlink()
    narrow = {key: tensor[:, :2].contiguous() if "lora_A" in key else tensor for key, tensor in state.items()}
    save_file(narrow, adapter_dir / "adapter_model.safetensors")
    with pytest.raises(UserError, match="does not fit this base model"):
        load_adapter(golden_model, adapter_dir)


def test_an_adapter_with_missing_layers_is_refused(golden_model, model_dir, tmp_path):
    adapter_dir = tmp_path / "adapter"
    old_adapter(model_dir, adapter_dir)
    state = torch.load(adapter_dir / "adapter_model.bin", weights_only=True)
    del state[sorted(state)[0]]
    torch.save(state, adapter_dir / "adapter_model.bin")
    with pytest.raises(UserError, match="missing"):
        load_adapter(golden_model, adapter_dir)


def test_classes_come_from_remote_scripts(family):
    classes = load_classes(family)
    assert classes.config is classes.model.config_class
    assert {item.__name__ for item in classes} == {
        "ChatGLMConfig",
        "ChatGLMForConditionalGeneration",
        "ChatGLMTokenizer",
    }
    assert all(item.__module__.startswith("transformers_modules.chatglm") for item in classes)


def test_glm_utils_import_does_no_work():
    code = "import glm_utils.checkpoint, sys; print('transformers_modules.chatglm' in str(list(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_DIR, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
