"""The matmuls with hand-written backward passes, compared with those of peft and bitsandbytes."""

import types

import bitsandbytes
import numpy as np
import peft
import pytest
import torch

from glm_utils.checkpoint import open_checkpoint
from glm_utils.training import lora_matmul, nf4_kernel
from glm_utils.training.lora_matmul import LoraMatmul, use_lean_matmuls
from glm_utils.training.lora_model import make_lora_config, make_lora_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # every test runs where there is a GPU too


@pytest.fixture
def make_model(model_dir):
    def make(dropout=0.0, compute_dtype="fp32", targets=("query_key_value", "dense_4h_to_h")):
        config = make_lora_config(4, 8, dropout, list(targets))
        args = types.SimpleNamespace(device=torch.device(DEVICE), seed=1)
        model = make_lora_model(open_checkpoint(model_dir), compute_dtype, config, args).train()
        generator = torch.Generator().manual_seed(0)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator))
        return model

    return make


@pytest.fixture
def batch(fixture_dir):
    golden = np.load(fixture_dir / "train_single.npz")
    return {key: torch.tensor(golden[key], device=DEVICE).long() for key in ("input_ids", "labels")}


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}


def as_peft(model):
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer | bitsandbytes.nn.Linear4bit):
            module.__dict__.pop("forward", None)
    return model


def distance(found, expected):
    """Return the largest relative distance of two sets of gradients."""
    assert found.keys() == expected.keys()
    return max(((found[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected)


def test_it_is_pefts(make_model, batch):
    model = make_model()
    loss, found = loss_and_gradients(model, batch)
    expected_loss, expected = loss_and_gradients(as_peft(model), batch)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert all("lora_" in name for name in found)
    assert distance(found, expected) < 1e-5


def test_bf16_is_as_near_to_fp32_as_with_peft(make_model, batch):
    _, exact = loss_and_gradients(make_model(), batch)
    model = make_model(compute_dtype="bf16")
    _, found = loss_and_gradients(model, batch)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    _, with_peft = loss_and_gradients(as_peft(model), batch)
    assert distance(found, exact) < 1.5 * distance(with_peft, exact)


@pytest.mark.parametrize("four_bit", [False, True])
def test_gradients_with_dropout(four_bit):
    """The same mask forward and backward, for x, A and B; gradcheck draws it anew with the same seed."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 32).double()
    if four_bit:
        quantized = bitsandbytes.nn.Linear4bit(64, 32, compute_dtype=torch.float64, quant_type="nf4")
        quantized.load_state_dict(torch.nn.Linear(64, 32).state_dict())
        linear = quantized.to("cpu")
    linear.requires_grad_(False)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 64), (3, 64), (32, 3))]

    def matmul(x, a, b):
        torch.manual_seed(1)
        return LoraMatmul.apply(x, a, b, linear, 2.0, 0.3)

    assert torch.autograd.gradcheck(matmul, inputs)
    x, a, b = inputs
    torch.manual_seed(1)
    dropped, mask = torch.native_dropout(x, 0.3, True)
    assert 0 < mask.sum() < mask.numel()
    weight = linear.weight
    if four_bit:  # not linear(x): on a CPU the fp64 matmul of bitsandbytes 0.50.2 differs from call to call
        weight = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).double()
    expected = x @ weight.T + linear.bias.double() + 2 * dropped @ a.T @ b.T
    assert torch.allclose(matmul(*inputs), expected, atol=1e-5)


def test_evaluation_and_disabled_adapters(make_model, batch):
    model = make_model(dropout=0.5).eval()
    with torch.no_grad():
        found = model(**batch).logits
        assert torch.equal(found, model(**batch).logits)  # no dropout
        expected = as_peft(model)(**batch).logits
        assert torch.allclose(found, expected, atol=1e-5)
        use_lean_matmuls(model)
        with model.disable_adapter():
            assert torch.allclose(model(**batch).logits, model.get_base_model()(**batch).logits, atol=1e-6)
            assert not torch.allclose(model(**batch).logits, found, atol=1e-3)


def test_it_keeps_the_input_and_little_else(make_model, batch):
    """What one layer saves for its backward pass: x in the compute dtype, a mask, the rank-sized x A^T."""
    linear, saved = torch.nn.Linear(64, 512, bias=False), []
    linear.requires_grad_(False)
    x, a, b = (torch.randn(shape, requires_grad=True) for shape in ((10, 64), (2, 64), (512, 2)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t.detach(), lambda t: t):
        LoraMatmul.apply(x, a, b, linear, 1.0, 0.1)
    assert sorted(saved) == sorted([10 * 64, 10 * 64, 10 * 2, 2 * 64, 512 * 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_layer_without_lora(monkeypatch, dtype, input_dtype):
    """`FrozenMatmul` gives bitsandbytes' result and gradient of x, and saves nothing for the backward pass."""
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(128, 96, compute_dtype=dtype, quant_type="nf4", compress_statistics=True)
    model = torch.nn.Sequential(layer).requires_grad_(False).to(DEVICE)
    x = torch.randn(3, 5, 128, device=DEVICE, dtype=input_dtype, requires_grad=True)
    expected = model(x)
    grad = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    use_lean_matmuls(model)
    saved, dequantized = [], []
    monkeypatch.setattr(
        lora_matmul, "dequantize_nf4", lambda *args: dequantized.append(1) or nf4_kernel.dequantize_nf4(*args)
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        found = model(x)
    assert not saved
    (found_grad,) = torch.autograd.grad(found, x, grad)
    assert len(dequantized) == 2
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    eps = max(torch.finfo(dtype).eps, torch.finfo(input_dtype).eps)
    for one, other, size in (
        (found, expected, x.double().abs() @ weight.abs().T),
        (found_grad, expected_grad, grad.double().abs() @ weight.abs()),
    ):
        assert one.dtype == input_dtype
        assert ((one - other).abs() <= 4 * eps * (size + 1)).all()
    model(x.detach())
    assert len(dequantized) == 2  # without gradients bitsandbytes computes


def test_bitsandbytes_computes_where_it_knows_more(monkeypatch):
    """Without a compute dtype, which its first forward chooses, and with a bias that is trained."""
    torch.manual_seed(0)
    x = torch.randn(5, 64, device=DEVICE, requires_grad=True)
    chooses = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4").to(DEVICE)
    trains = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32).to(DEVICE)
    trains.bias.requires_grad_(True)
    for layer in (chooses, trains):
        expected = layer(x)
        layer.compute_dtype, layer.compute_type_is_set = (None, False) if layer is chooses else (torch.float32, True)
        use_lean_matmuls(torch.nn.Sequential(layer))
        assert torch.equal(layer(x), expected)
    trains(x).sum().backward()
    assert torch.equal(trains.bias.grad, torch.full_like(trains.bias, 5.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(96, 128), (3, 64), (130, 192), (1, 64 * 257)])
def test_nf4_is_dequantized_as_by_bitsandbytes(monkeypatch, dtype, nested, shape):
    """The kernel, on a CPU under Triton's interpreter: rounded elsewhere once in fp32, and once in the dtype."""
    if nf4_kernel.triton is None:
        pytest.skip("no Triton")
    torch.manual_seed(0)
    weight = torch.randn(shape, device=DEVICE, dtype=dtype) * torch.logspace(-3, 1, shape[0], device=DEVICE)[:, None]
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight.to(dtype), quant_type="nf4", blocksize=64, compress_statistics=nested
    )
    expected = bitsandbytes.functional.dequantize_4bit(packed, state)
    door, calls = nf4_kernel.kernels_door(), []
    takes = door.triton_takes
    monkeypatch.setitem(door.OVERRIDES, "triton", True)
    monkeypatch.setattr(door, "triton_takes", lambda tensor: calls.append(1) or takes(tensor))
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", None)
    found = nf4_kernel.dequantize_nf4(packed, state)
    assert calls
    assert found.dtype == expected.dtype == dtype
    assert found.shape == expected.shape == shape
    largest = state.state2.absmax.max() + state.offset.abs() if nested else 0  # code values are at most 1
    bound = torch.finfo(torch.float32).eps * (largest + expected.abs().float())
    if dtype != torch.float32:
        bound += torch.finfo(dtype).eps * expected.abs().float()
    assert ((found - expected).abs().float() <= bound).all()
    if not nested and (DEVICE == "cuda" or dtype != torch.bfloat16):  # Triton's interpreter truncates to bf16
        assert torch.equal(found, expected)


def test_other_layouts_go_to_bitsandbytes(monkeypatch):
    """FP4, and other block sizes."""
    monkeypatch.setitem(nf4_kernel.kernels_door().OVERRIDES, "triton", True)
    for quant_type, block_size in (("fp4", 64), ("nf4", 128)):
        packed, state = bitsandbytes.functional.quantize_4bit(
            torch.randn(64, 128, device=DEVICE), quant_type=quant_type, blocksize=block_size
        )
        expected = bitsandbytes.functional.dequantize_4bit(packed, state)
        assert torch.equal(nf4_kernel.dequantize_nf4(packed, state), expected)


def test_the_door_turns_the_kernel_off(monkeypatch):
    """As CHATGLM_DISABLE_KERNELS=triton does, on any device."""
    packed, state = bitsandbytes.functional.quantize_4bit(
        torch.randn(64, 128, device=DEVICE), quant_type="nf4", blocksize=64
    )
    monkeypatch.setitem(nf4_kernel.kernels_door().OVERRIDES, "triton", False)
    monkeypatch.setattr(nf4_kernel, "_dequantize_kernel", None, raising=False)  # absent without Triton
    expected = bitsandbytes.functional.dequantize_4bit(packed, state)
    assert torch.equal(nf4_kernel.dequantize_nf4(packed, state), expected)
