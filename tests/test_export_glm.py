"""--export_format glm and tools.to_glm: the same logits in transformers' own class, merged and unmerged."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GlmForCausalLM

import merge_lora_and_quantize as stage
from glm_utils.checkpoint import open_checkpoint
from glm_utils.cli import UserError, run_cli
from glm_utils.export import chatglm, glm
from glm_utils.family import FAMILIES, PROJECT_DIR
from glm_utils.load_model import load_adapter, load_base_model
from glm_utils.merging import reload_check
from tests.conftest import change_config, write_quantized
from tests.test_merge import VARIED
from tools import to_glm as to_glm_module
from tools.to_glm import to_glm

FIXTURES_DIR = PROJECT_DIR / "tests" / "fixtures"
PLAIN = {"r": 4, "lora_alpha": 32, "target_modules": ["query_key_value"]}
SOME_LAYERS = {**PLAIN, "target_modules": ["query_key_value", "dense"], "layers_to_transform": [0, 2]}
SHAPES = {  # other heads, groups and biases than the golden model's
    "golden": {},
    "many heads": {"num_attention_heads": 6, "multi_query_group_num": 3, "kv_channels": 8, "hidden_size": 40},
    "one group": {"multi_query_group_num": 1, "ffn_hidden_size": 100, "layernorm_epsilon": 1e-3},
    "no groups": {"multi_query_attention": False, "add_qkv_bias": False, "num_layers": 1},
}
FILES = {"README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"}
FILES |= {"run_config.json", "tokenizer.json", "tokenizer_config.json"}
HISTORY = [("你好</s>", "好 sop")]


def _edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def family():
    return FAMILIES[1]


@pytest.fixture
def make_base(family, tmp_path):
    """Write a base: the golden model, or one of another shape with random fp16 weights; returns its directory."""

    def make(name="golden"):
        target, source = tmp_path / "base", FIXTURES_DIR / family.name / "model"
        target.mkdir()
        for file_name in ("config.json", "tokenizer_config.json", family.tokenizer_file, "model.safetensors"):
            shutil.copyfile(source / file_name, target / file_name)
        if SHAPES[name]:
            model = load_base_model(open_checkpoint(source))
            config = model.config.from_dict({**json.loads((source / "config.json").read_text()), **SHAPES[name]})
            torch.manual_seed(0)
            model = type(model)(config)
            for parameter in model.parameters():  # biases and norms too
                parameter.data = (parameter.data + 0.05 * torch.randn_like(parameter)).half().float()
            save_file(model.state_dict(), target / "model.safetensors", {"format": "pt"})
            _edit(target / "config.json", **SHAPES[name])
        return target

    return make


@pytest.fixture
def base_dir(make_base):
    """The golden model, free to be broken."""
    return make_base()


@pytest.fixture
def adapter(tmp_path):
    """Make an adapter with random weights for a base through peft; returns its directory."""

    def make(base_dir, **settings):
        model = load_base_model(open_checkpoint(base_dir))
        model.name_or_path = str(base_dir)
        torch.manual_seed(1)
        config = peft.LoraConfig(**{**PLAIN, **settings}, init_lora_weights=False)
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the merge, or with convert=True tools.to_glm, without the check in a fresh process."""

    def run_stage(name, convert=False, verify=False, **arguments):
        if not verify:
            for module in (glm, chatglm):
                monkeypatch.setattr(module, "verify", lambda job, directory, reference: None)
        arguments = {key: str(value) if key.endswith("path") else value for key, value in arguments.items()}
        if convert:
            to_glm(output_path=str(tmp_path / name), **arguments)
        else:
            arguments = {"qbits": 0, "device": "cpu", "export_format": "glm", **arguments}
            stage.merge_lora_and_quantize(output_path=str(tmp_path / name), **arguments)
        return tmp_path / name

    return run_stage


@torch.no_grad()
def _logits(model, batch):
    """Return fp32 logits of a left-padded batch, without the padded positions."""
    logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return logits[batch["attention_mask"].bool()]


def _batch(base_dir):
    tokenizer = open_checkpoint(base_dir).tokenizer
    examples = [{"input_ids": tokenizer.encode_prompt(text, HISTORY)} for text in ("类型#裙*颜色#白色", "a", "😀你好")]
    return tokenizer.pad(examples, padding=True, return_tensors="pt")


def _assert_same(found, expected):
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# ---- the merged model


@pytest.mark.parametrize("name", list(SHAPES))
def test_merged_logits_in_the_native_class(make_base, adapter, run, name):
    base_dir = make_base(name)
    out = run("merged", lora_path=adapter(base_dir, **VARIED))
    published = load_base_model(
        open_checkpoint(run("published", lora_path=base_dir.with_name("adapter"), export_format="chatglm"))
    )
    native, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert type(native) is GlmForCausalLM
    assert not any(info.values())
    _assert_same(_logits(native, _batch(base_dir)), _logits(published, _batch(base_dir)))


def test_command_end_to_end(base_dir, adapter, run, tmp_path, log_lines, monkeypatch):
    out = run("merged", lora_path=adapter(base_dir), verify=True)
    assert {path.name for path in out.iterdir()} == FILES
    assert any("fresh process, AutoModelForCausalLM.from_pretrained" in line for line in log_lines)
    config = AutoConfig.from_pretrained(out)
    assert (config.model_type, config.eos_token_id, config.pad_token_id, config.dtype) == ("glm", 2, 0, torch.float16)
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.float16}
    assert "AutoModelForCausalLM.from_pretrained(path)" in (out / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out, dtype="float32")
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
    assert tokenizer.model_max_length == 512
    messages = [{"role": "user", "content": "你好"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    ours = load_adapter(load_base_model(open_checkpoint(base_dir)), tmp_path / "adapter").merge_and_unload().eval()
    ours_ids = torch.tensor([open_checkpoint(base_dir).tokenizer.encode_prompt("你好")])
    generated = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert torch.equal(generated, ours.generate(input_ids=ours_ids, max_new_tokens=24, do_sample=False))


def test_large_models_are_checked_module_by_module(base_dir, adapter, run):
    out = run("merged", lora_path=adapter(base_dir))
    ids = open_checkpoint(base_dir).tokenizer.encode_prompt("你好")
    form = reload_check.FORMS["native"]
    full = reload_check.full_logits(out, ids, "cpu", form)
    assert torch.equal(full, reload_check.by_module_logits(out, ids, "cpu", form))


def test_a_directory_that_computes_something_else_is_refused(base_dir, adapter, run, monkeypatch, tmp_path):
    def swap(name, config, native_tensors=glm.native_tensors):
        parts = native_tensors(name, config)
        if len(parts) == 3:  # keys and values have the same shape
            _, k_name, v_name = parts
            parts[k_name], parts[v_name] = parts[v_name], parts[k_name]
        return parts

    monkeypatch.setattr(glm, "native_tensors", swap)
    with pytest.raises(UserError, match="the written model differs"):
        run("merged", lora_path=adapter(base_dir), verify=True)
    assert not (tmp_path / "merged").exists()


# ---- base and adapter apart


@pytest.mark.parametrize("name", list(SHAPES))
def test_converted_base(make_base, run, name):
    base_dir = make_base(name)
    out = run("native", convert=True, model_name_or_path=base_dir)
    assert {path.name for path in out.iterdir()} == FILES - {"README.md"}
    native = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    _assert_same(
        _logits(native, _batch(base_dir)), _logits(load_base_model(open_checkpoint(base_dir)), _batch(base_dir))
    )


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("settings", [PLAIN, VARIED], ids=["plain", "varied"])
def test_adapter_on_the_native_base(make_base, adapter, run, name, settings):
    base_dir = make_base(name)
    adapter_dir = adapter(base_dir, **settings)
    ours = load_adapter(load_base_model(open_checkpoint(base_dir)), adapter_dir)
    expected, without = (
        _logits(ours, _batch(base_dir)),
        _logits(load_base_model(open_checkpoint(base_dir)), _batch(base_dir)),
    )
    assert (expected - without).abs().max() > 0.1  # the update matters
    native_dir = run("native", convert=True, model_name_or_path=base_dir)
    out = run("native_adapter", convert=True, lora_path=adapter_dir)
    native = AutoModelForCausalLM.from_pretrained(native_dir, dtype=torch.float32)
    native = peft.PeftModel.from_pretrained(native, str(out))
    stored = load_file(out / "adapter_model.safetensors")
    assert set(peft.get_peft_model_state_dict(native)) == set(stored)
    _assert_same(_logits(native, _batch(base_dir)), expected)


def test_adapter_files(base_dir, adapter, run):
    adapter_dir = adapter(base_dir)
    out = run("native_adapter", convert=True, lora_path=adapter_dir)
    assert {path.name for path in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "run_config.json",
    }
    stored, original = (
        load_file(out / "adapter_model.safetensors"),
        load_file(adapter_dir / "adapter_model.safetensors"),
    )
    for layer in range(3):
        prefix = f"base_model.model.transformer.encoder.layers.{layer}.self_attention.query_key_value"
        native = f"base_model.model.model.layers.{layer}.self_attn"
        parts = [stored[f"{native}.{part}_proj.lora_B.weight"] for part in "qkv"]
        assert [part.shape[0] for part in parts] == [64, 32, 32]
        assert torch.equal(torch.cat(parts), 8 * original[f"{prefix}.lora_B.weight"])  # alpha / r = 32 / 4
        for part in "qkv":
            assert torch.equal(stored[f"{native}.{part}_proj.lora_A.weight"], original[f"{prefix}.lora_A.weight"])
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert config["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    assert not {"rank_pattern", "alpha_pattern", "use_rslora"} & config.keys()  # engines do not read them


def test_adapter_of_some_layers(base_dir, adapter, run):
    adapter_dir = adapter(base_dir, **SOME_LAYERS)
    out = run("native_adapter", convert=True, lora_path=adapter_dir)
    targets = json.loads((out / "adapter_config.json").read_text())["target_modules"]
    assert len(targets) == 8
    assert {target.split(".")[2] for target in targets} == {"0", "2"}
    native = AutoModelForCausalLM.from_pretrained(
        run("native", convert=True, model_name_or_path=base_dir), dtype=torch.float32
    )
    ours = load_adapter(load_base_model(open_checkpoint(base_dir)), adapter_dir)
    native = peft.PeftModel.from_pretrained(native, str(out))
    _assert_same(_logits(native, _batch(base_dir)), _logits(ours, _batch(base_dir)))


# ---- bad input


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_have_no_native_form(base_dir, adapter, run, tmp_path, bits):
    with pytest.raises(UserError, match=f"--qbits {bits}: --export_format glm writes fp16.*Give --qbits 0"):
        run("merged", lora_path=adapter(base_dir), qbits=bits)
    quantized = write_quantized(base_dir, tmp_path / "quantized", bits)
    with pytest.raises(UserError, match="quantized already.*GlmForCausalLM has no layout.*fp16 checkpoint"):
        run("native", convert=True, model_name_or_path=quantized)


def test_chatglm_6b_has_no_native_class(adapter, run):
    base_dir = FIXTURES_DIR / "chatglm-6b" / "model"
    adapter_dir = adapter(base_dir)
    message = "is ChatGLM-6B: transformers has no class of its own that computes it"
    with pytest.raises(UserError, match=message):
        run("merged", lora_path=adapter_dir)
    for arguments in ({"lora_path": adapter_dir}, {"model_name_or_path": base_dir}):
        with pytest.raises(UserError, match=message):
            run("native", convert=True, **arguments)


def test_biases_that_glm_does_not_have(base_dir, run):
    change_config(base_dir, add_bias_linear=True)
    with pytest.raises(UserError, match="add_bias_linear is true, and GlmForCausalLM has no such biases"):
        run("native", convert=True, model_name_or_path=base_dir)


def test_a_vocabulary_that_cannot_be_converted_is_refused_before_any_work(base_dir, run, monkeypatch):
    monkeypatch.setattr(glm, "write", lambda *args: pytest.fail("work was done"))
    shutil.copyfile(FIXTURES_DIR / "chatglm-6b" / "model" / "ice_text.model", base_dir / "tokenizer.model")
    with pytest.raises(UserError, match="tokenizer.model"):
        run("native", convert=True, model_name_or_path=base_dir)


def test_room_for_an_adapter_is_asked_for_before_the_work(base_dir, adapter, run, tmp_path, monkeypatch):
    """What is asked for is more than is written, but not much more."""
    adapter_dir, usage = adapter(base_dir), shutil.disk_usage(tmp_path)
    out = run("native", convert=True, lora_path=adapter_dir)
    written, asked = sum(path.stat().st_size for path in out.iterdir()), []
    monkeypatch.setattr(to_glm_module, "check_free_space", lambda place, num_bytes: asked.append(num_bytes))
    run("again", convert=True, lora_path=adapter_dir)
    assert written < asked[0] < 2 * written + 40_000
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=written // 2))
    with pytest.raises(UserError, match="MB free, .* MB needed. Free some space"):
        run("full", convert=True, lora_path=adapter_dir)
    assert not (tmp_path / "full").exists()


def test_arguments_of_the_tool(base_dir, run, tmp_path, capsys):
    for arguments in ({}, {"model_name_or_path": base_dir, "lora_path": base_dir}):
        with pytest.raises(UserError, match="give either --model_name_or_path.*or --lora_path"):
            run("native", convert=True, **arguments)
    out = run("native", convert=True, model_name_or_path=base_dir)
    with pytest.raises(UserError, match="not empty. Give another directory, or --overwrite"):
        run("native", convert=True, model_name_or_path=base_dir)
    (out / "old.txt").write_text("goes")
    run("native", convert=True, model_name_or_path=base_dir, overwrite=True)
    assert not (out / "old.txt").exists()
    with pytest.raises(UserError, match="overlaps the input"):
        run("base/native", convert=True, model_name_or_path=base_dir)
    with pytest.raises(SystemExit):
        run_cli(to_glm, ["--lora_pth=a", f"--output_path={tmp_path}"])
    assert "Did you mean --lora_path?" in capsys.readouterr().err
