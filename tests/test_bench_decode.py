"""The benchmark against baselines: models made in memory are those that are loaded, every case has its figures."""

import json
import re
import weakref

import pytest
import torch

from benchmarks import bench_decode as bench
from benchmarks.harness.checkpoints import write_random_adapter
from benchmarks.harness.published import published_model
from benchmarks.harness.random_models import quantize_to_nf4
from glm_utils.checkpoint import open_checkpoint
from glm_utils.cli import UserError
from glm_utils.family import PROJECT_DIR
from glm_utils.inference.memory import weight_bytes
from glm_utils.load_model import load_adapter, load_base_model

CPU = torch.device("cpu")


@pytest.fixture
def make(family):
    """Make the model of a case by its name, at the size of a family's small model, in fp32."""

    def make_case(name, dtype=torch.float32):
        (case,) = bench.choose_cases(bench.CASES, name)
        return bench.make_model(bench.base_for(family, "tiny"), case, dtype, CPU)

    return make_case


@pytest.fixture
def small_dir(family):
    """Directory of a family's small model."""
    return PROJECT_DIR / "models" / f"{family.name.removesuffix('-6b')}-tiny"


def layout(model):
    """Return shape and dtype of everything that a model stores and uses; bitsandbytes adds numbers as text."""
    stored, left_out = model.state_dict().items(), re.compile("inv_freq|bitsandbytes__nf4")
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored if not left_out.search(name)}


def test_random_weights(make, small_dir):
    """Noise of 0.02 in matrices, ones and zeros in norms and biases; buffers as in a loaded model, whatever dtype."""
    model, loaded = make("fp16", torch.float16), load_base_model(open_checkpoint(small_dir))
    assert layout(model).keys() == layout(loaded).keys()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            assert parameter.float().std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            assert parameter.unique().tolist() == [float("norm" in name and name.endswith("weight"))], name
    for (name, ours), (_, theirs) in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3), name  # stored in fp16; the models compute them afresh


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_quantized_models_are_those_of_a_directory(make, name, small_dir, tmp_path):
    load_base_model(open_checkpoint(small_dir)).quantize(int(name[3:])).save_pretrained(tmp_path)
    open_checkpoint(small_dir).tokenizer.save_pretrained(tmp_path)
    assert layout(make(name)) == layout(load_base_model(open_checkpoint(tmp_path)))


def test_nf4_is_that_of_loading(make, small_dir):
    """The same weights give the same logits as with load_in_4bit, and as many bytes."""
    loaded = load_base_model(open_checkpoint(small_dir), load_in_4bit=True).eval()
    model = load_base_model(open_checkpoint(small_dir)).eval()
    quantize_to_nf4(model, torch.float32)
    ids = torch.tensor([open_checkpoint(small_dir).tokenizer.encode_prompt("类型#裙*颜色#白色")])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert weight_bytes(make("nf4")) == weight_bytes(model) == weight_bytes(loaded)


def test_adapter_equals_a_loaded_one(make, small_dir, tmp_path):
    write_random_adapter(small_dir, tmp_path / "adapter", ["query_key_value"])
    base = load_base_model(open_checkpoint(small_dir), load_in_4bit=True, dtype="fp16")
    loaded = load_adapter(base, tmp_path / "adapter").get_base_model()
    model = make("nf4 + adapter", torch.float16)
    assert layout(model) == layout(loaded)
    assert type(model) is type(loaded)
    lora = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
    assert lora
    assert all(weight.count_nonzero() for weight in lora.values())


def test_native_model_has_our_size(family, make):
    if family.native_class is None:
        with pytest.raises(UserError, match="only ChatGLM2"):
            make("native")
    else:
        ours = weight_bytes(make("fp16"))
        assert weight_bytes(make("native")) == pytest.approx(ours, rel=1e-4)  # but for the table of frequencies


def test_peak_is_measured_after_quantizing(make, monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "reset_peak_memory", lambda device: seen.append(device))
    moved = bench.compacted
    monkeypatch.setattr(bench, "compacted", lambda model, device: seen.append("moved") or moved(model, device))
    make("int4")
    assert seen == ["moved", CPU]
    make("fp16")
    assert seen == ["moved", CPU, CPU]


def test_sizes_are_the_published_ones(family):
    """Without making the model: its parameters on no device are as many as those of the checkpoint."""
    base = bench.base_for(family, "6b")
    classes = bench.load_classes(family)
    with torch.device("meta"):
        model = classes.model(classes.config.from_dict(base.config))
    shapes = {name: shape for name, shape in published_model(family.name)["shapes"].items() if "inv_freq" not in name}
    assert {name: list(parameter.shape) for name, parameter in model.named_parameters()} == shapes
    tokenizer = open_checkpoint(base.tokenizer_dir).tokenizer
    assert tokenizer.eos_token_id == model.config.eos_token_id


def test_lengths_of_the_cases():
    lengths = {case.name: case.num_tokens(32, 512) for case in bench.CASES}
    slow = {"fp16 eager", "native", "native batch 8", "nf4 eager", "int4 eager"}
    assert {name for name, found in lengths.items() if found == (32, 64)} == slow
    assert lengths.pop("int4 at 2048 tokens") == (1536, 512)
    assert {found for name, found in lengths.items() if name not in slow} == {(32, 512)}
    (eager,) = bench.choose_cases(bench.CASES, "fp16 eager")
    assert eager.num_tokens(32, 3) == (32, 2)


def test_every_model_says_what_it_is(tmp_path, capsys):
    """Both families; transformers' own model is of one of them only."""
    path, names = tmp_path / "result.json", "fp16,native batch 8,nf4 + adapter,int8,int4 eager,int4 batch 16"
    flags = {"scale": "tiny", "prompt_tokens": 9, "new_tokens": 24, "loop_number": 1}
    bench.bench_decode(cases=names, output_json=str(path), **flags)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(path.read_text("utf-8")) == result
    keys = ("label", "batch_size", "num_prompt_tokens", "num_new_tokens")
    shared = [("nf4 + adapter", 1, 9, 24), ("int8", 1, 9, 24), ("int4 eager", 1, 9, 3), ("int4 batch 16", 16, 9, 24)]
    expected = [("fp16", 1, 9, 24), ("native batch 8", 8, 9, 3), *shared]
    expected = [(f"chatglm2-tiny {name}", *numbers) for name, *numbers in expected]
    expected += [(f"chatglm-tiny {name}", *numbers) for name, *numbers in [("fp16", 1, 9, 24), *shared]]
    assert [tuple(figures[key] for key in keys) for figures in result["models"]] == expected
    dtype = "fp16" if torch.cuda.is_available() else "fp32"
    formats = [dtype, "nf4", "int8", "int4", "int4"]
    assert [figures["weight_format"] for figures in result["models"]] == [dtype, *formats, *formats]
    for figures in result["models"]:
        assert figures["tokens_per_second"] > 0
        assert figures["bandwidth_share"] > 0
        assert "load_seconds" not in figures
    assert {"torch", "device"} <= result["versions"].keys()


def test_an_error_ends_its_case_only(tmp_path, monkeypatch, log_lines):
    """Each case finds the figures of earlier ones in the file and their models freed; out of memory is no "failed"."""
    path, seen, made, alive = tmp_path / "result.json", [], [], []
    make_model = bench.make_model

    def failing_model(base, case, *args):
        seen.append(
            [figures.get("error") for figures in json.loads(path.read_text())["models"]] if path.exists() else None
        )
        alive.extend(ref for ref in made if ref() is not None)
        if case.name == "int8":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if case.name == "nf4":
            raise ValueError("no such thing")
        model = make_model(base, case, *args)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(bench, "make_model", failing_model)
    flags = {"scale": "tiny", "families": "chatglm2-6b", "new_tokens": 2, "loop_number": 1}
    with pytest.raises(UserError, match="failed: chatglm2-tiny nf4;"):
        bench.bench_decode(cases="fp16,nf4,int8,int4", output_json=str(path), **flags)
    assert seen == [None, [None], [None, "failed"], [None, "failed", "out of memory"]]
    assert len(made) == 2
    assert alive == []
    models = json.loads(path.read_text("utf-8"))["models"]
    assert [figures.get("error") for figures in models] == [None, "failed", "out of memory", None]
    assert all(figures["num_new_tokens"] == 2 for figures in models)
    assert any("no such thing" in line for line in log_lines)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"new_tokens": 1}, "--new_tokens 1: expected 2 or more"),
        ({"loop_number": 0}, "--loop_number 0"),
        ({"cases": "int5"}, "no case 'int5'"),
        ({"families": "glm"}, "--family glm"),
        ({"prompt_tokens": 1}, "--prompt_tokens 1"),
        ({"cases": "native", "families": "chatglm-6b"}, "--cases native: none for chatglm-6b"),
        ({"new_tokens": 2040}, "--new_tokens 2040: expected less than 2032"),
    ],
)
def test_refusals(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        bench.bench_decode(**{"scale": "tiny", "output_json": str(tmp_path / "x.json"), **flags})


@pytest.mark.gpu
def test_peak_of_a_case_is_its_own(tmp_path):
    """At 6B size int4 runs in less memory than its unquantized weights take."""
    path = tmp_path / "result.json"
    flags = {"families": "chatglm2-6b", "new_tokens": 8, "loop_number": 1, "output_json": str(path)}
    bench.bench_decode(cases="nf4,int4", **flags)
    for figures in json.loads(path.read_text("utf-8"))["models"]:
        assert figures["weight_bytes"] <= figures["peak_allocated_bytes"] <= figures["peak_reserved_bytes"] < 6e9
