"""The int8/int4 layout, the search for scales and the quantized modules, against golden vectors and by properties."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from glm_utils.checkpoint import open_checkpoint
from glm_utils.family import FAMILIES, PROJECT_DIR
from glm_utils.load_model import load_base_model
from tests.fresh_scripts import load_script

FILES = [family.remote_dir / "quantization.py" for family in FAMILIES]
FIXTURES_DIR = PROJECT_DIR / "tests" / "fixtures"


Q = load_script("quantization")


def _squared_error(weight, bits, method, **kwargs):
    """Return the squared error of each row, relative to its energy."""
    stored, scale = Q.quantize_rows(weight, bits, method, **kwargs)
    dequantized = Q.dequantize_rows(stored, scale, bits, torch.float64)
    weight = weight.double()
    return (weight - dequantized).square().sum(1) / weight.square().sum(1).clamp(min=1e-300)


def _rows(kind, num_rows, num_columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(num_rows, num_columns, generator=generator)
    if kind == "heavy":
        chi = torch.randn(3, num_rows, num_columns, generator=generator).square().sum(0)
        normal = normal / (chi / 3).sqrt()
    elif kind == "skewed":
        normal = normal.exp() - 1
    elif kind == "uniform":
        normal = torch.rand(num_rows, num_columns, generator=generator) - 0.5
    return (0.02 * normal).half()


def test_both_directories_hold_the_same_file():
    assert FILES[0].read_bytes() == FILES[1].read_bytes()


# ---- the layout


def test_nibble_table_all_256_bytes(fixture_dir):
    table = np.load(fixture_dir / "quant_unit.npz")
    packed = torch.from_numpy(table["nibble_table.byte"]).reshape(256, 1)
    values = torch.from_numpy(table["nibble_table.values"])
    assert torch.equal(Q.unpack_int4(packed), values)
    assert torch.equal(Q.pack_int4(values), packed)


@pytest.mark.parametrize("bits", [8, 4])
def test_absmax_is_the_published_quantizer(fixture_dir, bits):
    unit = {name: torch.from_numpy(array) for name, array in np.load(fixture_dir / "quant_unit.npz").items()}
    stored, scale = Q.quantize_rows(unit["weight_fp16"], bits, "absmax")
    assert torch.equal(stored, unit[f"int{bits}.weight"])
    assert torch.equal(scale, unit[f"int{bits}.weight_scale_fp16"])
    assert torch.equal(Q.unpack(stored, bits), unit[f"int{bits}.unpacked"])
    assert torch.equal(Q.dequantize_rows(stored, scale, bits, torch.float16), unit[f"int{bits}.dequant_fp16"])
    assert torch.equal(Q.dequantize_rows(stored, scale, bits, torch.float32), unit[f"int{bits}.dequant_fp32"])


@pytest.mark.parametrize("shape", [(1, 2), (3, 6), (5, 7, 34), (0, 4)])
def test_pack_and_unpack_are_inverse(shape):
    codes = torch.randint(-8, 8, shape, dtype=torch.int8)
    packed = Q.pack_int4(codes)
    assert packed.dtype == torch.int8
    assert packed.shape == (*shape[:-1], shape[-1] // 2)
    assert torch.equal(Q.unpack_int4(packed), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantizing_rounds_once(bits):
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int8).repeat(9, 1)
    stored = Q.pack_int4(codes) if bits == 4 else codes
    scale = torch.randn(9).mul(0.01).half()
    exact = codes.double() * scale.double().unsqueeze(1)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert torch.equal(Q.dequantize_rows(stored, scale, bits, dtype), exact.to(dtype))


# ---- the search


def test_search_more_than_halves_the_error_on_gaussian_rows():
    weight = _rows("gaussian", 64, 4096)
    absmax = _squared_error(weight, 4, "absmax").mean().item()
    search = _squared_error(weight, 4, "search").mean().item()
    assert absmax == pytest.approx(0.0246, abs=0.001)
    assert search == pytest.approx(0.0116, abs=0.0002)


def test_search_tames_heavy_tails():
    weight = _rows("heavy", 64, 4096)
    assert _squared_error(weight, 4, "search").mean() < 0.5 * _squared_error(weight, 4, "absmax").mean()


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "skewed", "uniform"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(3, 2), (130, 64), (17, 176), (5, 4098)])
def test_search_is_never_worse_than_absmax(kind, bits, shape):
    weight = _rows(kind, *shape)
    absmax = _squared_error(weight, bits, "absmax", scale_dtype=torch.float16)
    search = _squared_error(weight, bits, "search")
    assert (search <= absmax * (1 + 1e-4) + 1e-9).all()


@pytest.mark.parametrize("kind", ["gaussian", "heavy"])
def test_search_is_close_to_an_exhaustive_one(kind):
    weight = _rows(kind, 24, 512).float()
    best = torch.full((24, 1), torch.inf)
    highest = weight.abs().amax(1, keepdim=True) / 7
    for factor in torch.logspace(0, -1.3, 1500, base=10):
        for sign in (1, -1):
            scale = sign * factor * highest
            error = (weight - scale * (weight / scale).round().clamp(-8, 7)).square().sum(1, keepdim=True)
            best = torch.minimum(best, error)
    relative = (best / weight.square().sum(1, keepdim=True)).flatten()
    assert (_squared_error(weight, 4, "search") <= 1.02 * relative).all()


def test_search_uses_code_minus_8_and_both_signs():
    stored, scale = Q.quantize_rows(_rows("gaussian", 64, 4096), 4)
    codes = Q.unpack(stored, 4)
    assert codes.min() == -8
    assert codes.max() == 7
    assert (scale < 0).any()
    assert (scale > 0).any()


def test_published_code_reads_searched_rows():
    weight = _rows("gaussian", 8, 64)
    stored, scale = Q.quantize_rows(weight, 4)
    packed = stored.numpy()
    even, odd = packed >> 4, (packed << 4).astype(np.int8) >> 4
    dequantized = np.stack([even, odd], -1).reshape(8, 64).astype(np.float16) * scale.numpy()[:, None]
    assert np.array_equal(dequantized, Q.dequantize_rows(stored, scale, 4, torch.float16).numpy())


def test_result_does_not_depend_on_chunks_strides_or_repetition(monkeypatch):
    weight = _rows("heavy", 37, 66)
    stored, scale = Q.quantize_rows(weight, 4)
    monkeypatch.setattr(Q, "CPU_CHUNK", 100)
    for again in (weight, weight.t().contiguous().t(), torch.cat([weight, weight], 1)[:, :66]):
        stored_again, scale_again = Q.quantize_rows(again, 4)
        assert torch.equal(stored, stored_again)
        assert torch.equal(scale, scale_again)


@pytest.mark.parametrize("method", ["search", "absmax"])
@pytest.mark.parametrize("bits", [4, 8])
def test_extreme_rows(method, bits):
    least = 2.0**-24
    weight = torch.zeros(6, 8, dtype=torch.float16)
    weight[1, 3] = least
    weight[2] = torch.tensor([least, -least, 3 * least, 0, 0, 0, 0, 0])
    weight[3] = 65504
    weight[4, ::2] = -65504
    weight[5, 0] = 1.0
    stored, scale = Q.quantize_rows(weight, bits, method)
    dequantized = Q.dequantize_rows(stored, scale, bits, torch.float16)
    assert torch.isfinite(dequantized).all()
    assert scale[0] == 0
    assert not stored[0].any()
    assert (scale[1:] != 0).all()
    assert dequantized[1, 3] == least
    assert torch.allclose(
        dequantized[3:].float(), weight[3:].float(), rtol=0.13 if (method, bits) == ("absmax", 4) else 0.01
    )


def test_scale_dtype_follows_the_weight():
    weight = torch.randn(4, 8)
    assert Q.quantize_rows(weight, 4)[1].dtype == torch.float32
    assert Q.quantize_rows(weight.half(), 4)[1].dtype == torch.float16
    assert Q.quantize_rows(weight.bfloat16(), 8, "absmax")[1].dtype == torch.float16
    assert Q.quantize_rows(weight, 8, scale_dtype=torch.float16)[1].dtype == torch.float16


@pytest.mark.parametrize("shape", [(0, 8), (4, 0)])
def test_empty_weights(shape):
    for bits in (4, 8):
        stored, scale = Q.quantize_rows(torch.zeros(shape, dtype=torch.float16), bits)
        assert Q.dequantize_rows(stored, scale, bits, torch.float16).shape == shape


@pytest.mark.parametrize(
    ("weight", "bits", "method", "message"),
    [
        (torch.ones(2, 4), 3, "search", "4 or 8, not 3"),
        (torch.ones(2, 4), "4", "search", "4 or 8, not '4'"),
        (torch.ones(2, 4), 4, "best", "'search' or 'absmax'"),
        (torch.ones(2, 5), 4, "search", "even, not 5"),
        (torch.ones(4), 4, "search", "floating matrix"),
        (torch.ones(2, 4, dtype=torch.int8), 8, "search", "floating matrix"),
        (torch.tensor([[1.0, torch.nan]]), 8, "search", "nan"),
        (torch.tensor([[1.0, torch.inf]]), 4, "absmax", "inf"),
        (torch.tensor([[1.0, 1e5]]).bfloat16(), 4, "search", "float16"),
    ],
)
def test_refusals_say_what_was_found(weight, bits, method, message):
    with pytest.raises(ValueError, match=message):
        Q.quantize_rows(weight, bits, method)


# ---- the modules


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 3, 6)])
def test_linear_forward_and_gradients_equal_the_dequantized_weight(bits, bias, shape):
    linear = nn.Linear(6, 5, bias=bias)
    module = Q.QuantizedLinear.from_linear(linear, bits)
    dequantized = Q.dequantize_rows(module.weight, module.weight_scale, bits, torch.float32)
    x = torch.randn(shape, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    got, expected = module(x), nn.functional.linear(y, dequantized, linear.bias)
    upstream = torch.randn_like(got)
    got.backward(upstream)
    got_bias = linear.bias.grad.clone() if bias else None
    linear.zero_grad()
    expected.backward(upstream)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(x.grad, y.grad)
    if bias:
        torch.testing.assert_close(got_bias, linear.bias.grad)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_parts", [2, 3, 37])
def test_a_wide_weight_is_dequantized_in_parts(monkeypatch, bits, bias, num_parts):
    """However many rows are dequantized at a time, the result is the same and no part is larger than allowed."""
    torch.manual_seed(0)
    module = Q.QuantizedLinear.from_linear(nn.Linear(6, 37, bias=bias), bits)
    module.weight_scale.fill_(0.5)  # with integers for x all sums are exact, whatever their order
    if bias:
        nn.init.constant_(module.bias, 3.0)
    x = torch.randint(-8, 9, (2, 3, 6)).float()
    whole = module(x)
    dequantized, sizes = Q._dequantized, []
    limit = 37 * 6 * 4 // num_parts

    def noted(*arguments):
        sizes.append(dequantized(*arguments).nbytes)
        return dequantized(*arguments)

    monkeypatch.setattr(Q, "_dequantized", noted)
    monkeypatch.setattr(Q, "DEQUANTIZED_BYTES", limit)
    assert torch.equal(module(x), whole)
    assert len(sizes) >= num_parts
    assert max(sizes) < limit + 6 * 4
    assert sum(sizes) == 37 * 6 * 4


def test_backward_keeps_the_stored_weight_only():
    module = Q.QuantizedLinear.from_linear(nn.Linear(64, 32), 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(torch.randn(3, 64, requires_grad=True))
    assert sorted(t.dtype.itemsize * t.numel() for t in kept) == [32 * 4, 32 * 32]


@pytest.mark.parametrize("bits", [4, 8])
def test_casts_and_copies(bits):
    module = Q.QuantizedLinear.from_linear(nn.Linear(32, 16).half(), bits)
    assert set(module.state_dict()) == {"weight", "weight_scale", "bias"}
    x, scale, weight = torch.randn(2, 32), module.weight_scale.clone(), module.weight.clone()
    for cast, dtype, scale_dtype in [
        ("float", torch.float32, torch.float32),
        ("half", torch.float16, torch.float16),
        ("bfloat16", torch.bfloat16, torch.float16),
        ("half", torch.float16, torch.float16),
        ("float", torch.float32, torch.float32),
    ]:
        module = copy.deepcopy(getattr(module, cast)())
        assert module(x.to(dtype)).dtype == module.bias.dtype == dtype
        assert module.weight.dtype == torch.int8
        assert module.weight_scale.dtype == scale_dtype
        assert torch.equal(module.weight_scale.half(), scale)
        assert torch.equal(module.weight, weight)
    assert not any(parameter is module.weight for parameter in module.parameters())


def test_autocast():
    module = Q.QuantizedLinear.from_linear(nn.Linear(32, 16), 8)
    x = torch.randn(2, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), module(x), atol=0.05, rtol=0.05)


def test_embedding_dequantizes_rows_and_shares_them_with_the_output_layer():
    source = nn.Embedding(10, 8).half()
    module = Q.QuantizedEmbedding.from_embedding(source, 4)
    ids = torch.tensor([[1, 9], [0, 1]])
    dequantized = Q.dequantize_rows(module.weight, module.weight_scale, 4, torch.float16)
    assert torch.equal(module(ids), dequantized[ids])
    assert set(module.state_dict()) == {"weight", "weight_scale"}
    for dtype in (torch.float32, torch.bfloat16):
        assert module.to(dtype)(ids).dtype == dtype
    lm_head = Q.output_layer_of(module.half())
    x = torch.randn(3, 8)
    expected = x @ Q.dequantize_rows(lm_head.weight, lm_head.weight_scale, 4, torch.float32).T
    torch.testing.assert_close(lm_head(x), expected)
    assert torch.equal(lm_head.weight, module.weight)


class _Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.query_key_value = nn.Linear(8, 24)
        self.dense = nn.Linear(8, 8, bias=False)
        self.mlp = nn.ModuleDict({"dense_h_to_4h": nn.Linear(8, 32), "dense_4h_to_h": nn.Linear(32, 8)})
        self.other = nn.Linear(8, 8)


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([_Layer(), _Layer()])
        self.lm_head = nn.Linear(8, 10)


def test_quantize_replaces_four_linears_a_layer_and_nothing_else():
    model = _Model()
    assert Q.quantize(model, 4) is model
    replaced = [name for name, module in model.named_modules() if isinstance(module, Q.QuantizedLinear)]
    assert len(replaced) == 8
    assert type(model.lm_head) is type(model.layers[0].other) is nn.Linear
    assert Q.quantize(model, 4) is model
    with pytest.raises(ValueError, match="4.*-bit weights"):
        Q.quantize(model, 8)


def test_replaced_empty_modules_load_a_quantized_state_dict_strictly():
    model, empty = Q.quantize(_Model().half(), 8), _Model().half()
    assert Q.insert_quantized_linears(empty.layers, 8) == 8
    empty.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(2, 8).half()
    assert torch.equal(empty.layers[1].query_key_value(x), model.layers[1].query_key_value(x))
    with torch.device("meta"):
        on_meta = _Model()
        Q.insert_quantized_linears(on_meta.layers, 4)
    assert on_meta.layers[0].dense.weight.is_meta
    assert on_meta.layers[0].dense.weight.shape == (8, 4)


def test_quantize_names_the_weight_it_refuses():
    model = _Model()
    with torch.no_grad():
        model.layers[1].dense.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layers.1.dense: cannot quantize a weight of nan"):
        Q.quantize(model, 4)
    with pytest.raises(ValueError, match="found none of the Linear modules"):
        Q.quantize(nn.Sequential(nn.Linear(2, 2)), 4)
    wrapped = _Model()
    wrapped.layers[0].dense = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="layers.0.dense, a torch.nn.modules.container.Sequential"):
        Q.quantize(wrapped, 4)
    assert not any(isinstance(module, Q.QuantizedLinear) for module in wrapped.modules())


# ---- whole models, against golden logits


@pytest.fixture
def quantized_dir(model_dir, tmp_path):
    """Build a checkpoint in the published quantized layout."""

    def build(bits):
        for path in model_dir.iterdir():
            if path.suffix != ".safetensors" and path.name != "config.json":
                shutil.copyfile(path, tmp_path / path.name)
        shutil.copyfile(model_dir / f"config_int{bits}.json", tmp_path / "config.json")
        weights = load_file(model_dir / "model.safetensors") | load_file(model_dir / f"model_int{bits}.safetensors")
        save_file(weights, tmp_path / "model.safetensors")
        return tmp_path

    return build


def _golden(fixture_dir, bits, what):
    return torch.from_numpy(np.load(fixture_dir / "quant_model.npz")[f"int{bits}.{what}"])


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
def test_published_quantized_checkpoints_load(fixture_dir, quantized_dir, bits):
    model = load_base_model(open_checkpoint(quantized_dir(bits))).eval()
    logits = model(input_ids=_golden(fixture_dir, bits, "input_ids_fp32product")).logits
    torch.testing.assert_close(logits, _golden(fixture_dir, bits, "logits_fp32product"), atol=1e-4, rtol=0)
    prompt = _golden(fixture_dir, bits, "input_ids_fp16product")
    generated = model.generate(input_ids=prompt, max_new_tokens=16, do_sample=False)
    assert generated[0, prompt.shape[1] :].tolist() == _golden(fixture_dir, bits, "greedy16_fp32product").tolist()
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            assert module.weight.dtype == torch.int8


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_rounded_to_fp16(fixture_dir, quantized_dir, bits):
    model = load_base_model(open_checkpoint(quantized_dir(bits))).eval()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "weight_scale"):
                linear = nn.Linear(child.in_features, child.out_features, child.bias is not None)
                dequantized = Q.dequantize_rows(child.weight, child.weight_scale, bits, torch.float16)
                linear.weight.data = dequantized.float()
                linear.bias = child.bias
                setattr(parent, name, linear)
    logits = model(input_ids=_golden(fixture_dir, bits, "input_ids_fp16product")).logits
    torch.testing.assert_close(logits, _golden(fixture_dir, bits, "logits_fp16product"), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
def test_half_precision_run_of_a_quantized_checkpoint(fixture_dir, quantized_dir, bits):
    model = load_base_model(open_checkpoint(quantized_dir(bits)), compute_dtype="fp16").eval()
    logits = model(input_ids=_golden(fixture_dir, bits, "input_ids_fp32product")).logits
    assert logits.dtype == torch.float16
    golden = _golden(fixture_dir, bits, "logits_fp32product")
    torch.testing.assert_close(logits.float(), golden, atol=0.05, rtol=0.02)


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_embeddings_of_chatglm_6b(bits, tmp_path):
    fixture_dir = FIXTURES_DIR / "chatglm-6b"
    model = load_base_model(open_checkpoint(fixture_dir / "model")).eval()
    script_dir = str(FILES[0].parent)
    quantize = get_class_from_dynamic_module("quantization.quantize", script_dir)
    quantize(model, bits, method="absmax", device="cpu", quantize_embeddings=True)
    ids, golden = _golden(fixture_dir, bits, "input_ids_fp16product"), "logits_quant_embeddings_fp32scale"
    torch.testing.assert_close(model(input_ids=ids).logits, _golden(fixture_dir, bits, golden), atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path)
    expected = json.loads((fixture_dir / "qe_state_keys.json").read_text())
    if bits == 4:
        state = load_file(tmp_path / "model.safetensors")
        assert {key: [str(state[key].dtype), list(state[key].shape)] for key in expected} == expected
    reloaded, info = type(model).from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(reloaded.eval()(input_ids=ids).logits, model(input_ids=ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
def test_model_quantize_as_published(golden_model, family, fixture_dir, bits):
    ids = _golden(fixture_dir, bits, "input_ids_fp16product")
    rounded = copy.deepcopy(golden_model)
    num_linears = 0
    for path, module in rounded.named_modules():
        if path.rpartition(".")[2] in family.linear_names:
            weight = module.weight.half()
            stored, scale = Q.quantize_rows(weight, bits)
            module.weight.data = Q.dequantize_rows(stored, scale, bits, torch.float32)
            steps = weight.float() / scale.float()[:, None]
            lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            rounding = steps.clamp(lowest, highest) - Q.unpack(stored, bits)  # the search may choose to clip
            assert rounding.abs().max() <= 0.5 + 2**-12
            num_linears += 1
    assert num_linears == 12
    assert golden_model.half().quantize(bits) is golden_model
    assert golden_model.config.quantization_bit == bits
    after = golden_model.float()(input_ids=ids).logits
    torch.testing.assert_close(after, rounded(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="bit weights"):
        golden_model.quantize(12 - bits)
    with pytest.raises(ValueError, match="4 or 8, not 3"):
        golden_model.quantize(3)


@torch.no_grad()
def test_model_quantize_takes_the_published_arguments(golden_model, family_name, fixture_dir, tmp_path):
    published = {"empty_init": True, "device": "cpu"}
    if family_name == "chatglm-6b":
        published = {"quantize_embeddings": True, "use_quantization_cache": True, "empty_init": True}
    else:
        with pytest.raises(ValueError, match="checkpoints hold no quantized embedding"):
            golden_model.quantize(8, quantize_embeddings=True)
    ids = _golden(fixture_dir, 8, "input_ids_fp16product")
    model = golden_model.quantize(8, **published)
    assert isinstance(model.get_input_embeddings(), nn.Embedding) == (family_name == "chatglm2-6b")
    assert (model.get_output_embeddings().weight.dtype == torch.int8) == (family_name == "chatglm-6b")
    model.save_pretrained(tmp_path)
    reloaded, info = type(model).from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(reloaded.eval()(input_ids=ids).logits, model(input_ids=ids).logits)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("method", ["search", "absmax"])
def test_gpu_quantizes_as_the_cpu_does(bits, method):
    weight = _rows("heavy", 64, 4098)
    stored, scale = (tensor.cpu() for tensor in Q.quantize_rows(weight.cuda(), bits, method))
    dequantized = Q.dequantize_rows(stored, scale, bits, torch.float32)
    on_gpu = (dequantized - weight.float()).square().sum() / weight.float().square().sum()
    on_cpu = _squared_error(weight, bits, method) * weight.double().square().sum(1)
    assert on_gpu.item() == pytest.approx((on_cpu.sum() / weight.double().square().sum()).item(), rel=1e-3)


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
def test_published_quantized_checkpoints_run_on_a_gpu(fixture_dir, quantized_dir, bits):
    model = load_base_model(open_checkpoint(quantized_dir(bits)), device_map={"": "cuda:0"}).eval()
    logits = model(input_ids=_golden(fixture_dir, bits, "input_ids_fp32product").cuda()).logits.cpu()
    torch.testing.assert_close(logits, _golden(fixture_dir, bits, "logits_fp32product"), atol=1e-4, rtol=0)
    logits = model.half()(input_ids=_golden(fixture_dir, bits, "input_ids_fp32product").cuda()).logits.float().cpu()
    torch.testing.assert_close(logits, _golden(fixture_dir, bits, "logits_fp32product"), atol=0.05, rtol=0.02)
