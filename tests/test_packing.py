"""Packed batches: the same losses and gradients as one example at a time, in both families, through every path."""

import pytest
import torch
from torch.nn import functional

from glm_utils.checkpoint import open_checkpoint
from glm_utils.collators import PackingCollator, loss_positions
from glm_utils.encoding import IGNORED_LABEL
from glm_utils.load_model import load_base_model

LENGTHS = ((9, 4), (6, 3), (20, 13), (7, 2), (4, 2))  # tokens of an example, and of its prompt


@pytest.fixture
def examples(golden_model, family):
    """Random examples of the family's form: prompt, (gMASK, bos in it for ChatGLM-6B,) answer."""
    generator, config, examples = torch.Generator().manual_seed(0), golden_model.config, []
    for num_tokens, num_prompt in LENGTHS:
        ids = torch.randint(10, 200, (num_tokens,), generator=generator)
        if hasattr(config, "gmask_token_id"):
            ids[num_prompt - 2], ids[num_prompt - 1] = config.gmask_token_id, config.bos_token_id
        labels = ids.clone()
        labels[:num_prompt] = IGNORED_LABEL
        examples.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return examples


def gradients(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def one_by_one(model, examples):
    """Return the losses and the gradients of their sum, each example alone."""
    model.zero_grad()
    losses = []
    for example in examples:
        ids, labels = (torch.tensor([example[key]], device=model.device) for key in ("input_ids", "labels"))
        loss = model(input_ids=ids, labels=labels, num_items_in_batch=1).loss
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses), gradients(model)


def packed(model, examples, **kwargs):
    """Return the summed loss and its gradients, all examples in one packed batch."""
    model.zero_grad()
    batch = {
        key: value.to(model.device) if torch.is_tensor(value) else value
        for key, value in PackingCollator()(examples).items()
    }
    loss = model(**{**batch, **kwargs}, num_items_in_batch=1).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1e-6)
        assert (found[name] - gradient).abs().max() / scale < tolerance, name


@pytest.mark.parametrize("with_logits", [False, True])
@pytest.mark.parametrize("frozen_output", [False, True])
def test_packed_examples_train_as_each_alone(golden_model, examples, with_logits, frozen_output):
    golden_model.get_output_embeddings().requires_grad_(not frozen_output)
    losses, expected = one_by_one(golden_model, examples)
    loss, found = packed(golden_model, examples, **({"loss_positions": None} if with_logits else {}))
    assert loss.item() == pytest.approx(losses.sum().item(), rel=1e-6)
    assert_close(found, expected, 1e-5)


def test_autocast_trains_as_without_it(golden_model, examples):
    """bf16 matmuls of fp32 weights, as "bf16": true in the JSON file asks for."""
    golden_model.get_output_embeddings().requires_grad_(False)
    loss, expected = packed(golden_model, examples)
    with torch.autocast("cpu", torch.bfloat16):
        found_loss, found = packed(golden_model, examples)
    assert found_loss.item() == pytest.approx(loss.item(), rel=1e-2)
    assert distance(found, expected) < 0.05


@pytest.mark.parametrize("family_name", ["chatglm-6b"])
def test_examples_without_a_prefix(golden_model):
    """Where every example begins with bos, nothing is bidirectional."""
    config = golden_model.config
    start = [config.bos_token_id, config.gmask_token_id]
    examples = [{"input_ids": [*start, 20, 21], "labels": [-100, -100, 20, 21]}]
    examples.append({"input_ids": [*start, 30], "labels": [-100, -100, 30]})
    losses, expected = one_by_one(golden_model, examples)
    loss, found = packed(golden_model, examples)
    assert loss.item() == pytest.approx(losses.sum().item(), rel=1e-6)
    assert_close(found, expected, 1e-5)


def test_each_example_has_its_own_logits(golden_model, examples):
    batch = PackingCollator()(examples)
    del batch["labels"]
    with torch.no_grad():
        logits = golden_model(**batch).logits[0].split([length for length, _ in LENGTHS])
        alone = [golden_model(input_ids=torch.tensor([example["input_ids"]])).logits[0] for example in examples]
    for found, expected in zip(logits, alone, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


def test_another_example_changes_nothing(golden_model, examples):
    """What stands in one example cannot reach another one, not even through the prefix."""
    other = [{**example, "input_ids": [index % 50 + 20 for index in example["input_ids"]]} for example in examples]
    other[1] = examples[1]
    for example, changed in zip(examples, other, strict=True):  # the control tokens stay where they are
        changed["input_ids"] = [
            old if old >= 200 else new for old, new in zip(example["input_ids"], changed["input_ids"], strict=True)
        ]
    with torch.no_grad():
        first, second = (
            golden_model(**{**PackingCollator()(part), "labels": None}).logits[0, 9:15] for part in (examples, other)
        )
    assert torch.equal(first, second)


def test_checkpointed_and_default_length(golden_model, examples):
    _, expected = packed(golden_model.train(), examples)
    golden_model.gradient_checkpointing_enable({"use_reentrant": False})
    _, found = packed(golden_model, examples)
    assert_close(found, expected, 1e-5)
    batch = PackingCollator()(examples)
    losses = [golden_model(**batch).loss, golden_model(**{**batch, "max_length_q": None}).loss]
    assert torch.equal(*losses)


def test_a_packed_batch_takes_no_mask_and_no_cache(golden_model, examples):
    batch = PackingCollator()(examples)
    with pytest.raises(ValueError, match=r"takes no attention_mask"):
        golden_model(**batch, attention_mask=torch.ones_like(batch["input_ids"]))
    cache = golden_model(input_ids=batch["input_ids"][:, :9], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"takes no past_key_values"):
        golden_model(**batch, past_key_values=cache)
    assert golden_model(**batch, use_cache=True).past_key_values is None


def test_collator():
    features = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    batch = PackingCollator()(features)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9]]  # 8 is not predicted from 7
    assert batch["loss_positions"].tolist() == [0, 1, 3]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert batch["max_length_q"] == 3
    assert (batch["input_ids"].dtype, batch["cu_seq_lens_q"].dtype) == (torch.int64, torch.int32)


def test_the_loss_without_logits_in_many_chunks(sibling, monkeypatch):
    """Chunks of one to all tokens, a last ragged one included, and an output layer that is trained or none at all."""
    module = sibling("fused_chatglm")
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 7, 16, generator=generator, requires_grad=True)
    labels = torch.randint(0, 33, (2, 7), generator=generator)
    labels[0, :3], labels[1, 5] = IGNORED_LABEL, IGNORED_LABEL
    linear = torch.nn.Linear(16, 33, bias=False)
    logits = linear(states)[:, :-1].flatten(0, 1)
    expected = functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL)
    (gradient,) = torch.autograd.grad(expected, states)
    for frozen in (True, False):
        linear.requires_grad_(not frozen)
        for num_tokens in (1, 2, 5, 100):
            monkeypatch.setattr(module, "CHUNK_LOGITS", 33 * num_tokens)
            loss = module.linear_cross_entropy(states, linear, labels, loss_positions(labels), None)
            assert torch.allclose(loss, expected, atol=1e-6)
            assert torch.allclose(torch.autograd.grad(loss, states)[0], gradient, atol=1e-6)


def distance(found, expected):
    """Return the relative distance of all gradients together, each in units of its own norm."""
    assert found.keys() == expected.keys()
    apart = [(found[name].float().cpu() - expected[name]).norm() / expected[name].norm() for name in expected]
    return torch.stack(apart).square().mean().sqrt().item()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_packed_examples_on_a_gpu(model_dir, examples, dtype):
    """Packing adds nothing to what the number format loses with each example alone."""
    _, exact = one_by_one(load_base_model(open_checkpoint(model_dir)), examples)
    model = load_base_model(open_checkpoint(model_dir), compute_dtype=dtype).cuda()
    losses, alone = one_by_one(model, examples)
    loss, found = packed(model, examples)
    assert loss.item() == pytest.approx(losses.sum().item(), rel={"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}[dtype])
    assert distance(found, exact) < 1.5 * distance(alone, exact) + 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(32, 2), (32, 32), (8, 1)])
def test_variable_length_attention_is_the_loop(sibling, num_heads, num_kv_heads, monkeypatch):
    """At the heads of the 6B models, with gradients: sequences of 1 to 200 tokens, causal and with prefixes."""
    module, overrides = sibling("attention_chatglm"), sibling("kernels_chatglm").OVERRIDES
    generator = torch.Generator("cuda").manual_seed(0)
    lengths = torch.tensor([1, 200, 128, 5, 129])
    boundaries = functional.pad(lengths.cumsum(0), (1, 0)).int().cuda()
    num_tokens = int(lengths.sum())
    prefix = torch.cat([torch.arange(n) < max(1, n // 3) for n in lengths.tolist()]).cuda()
    causal = module.PackedSequences(boundaries, 200, num_tokens)
    for sequences in (causal, causal.with_prefix(prefix)):
        shapes = [(1, heads, num_tokens, 128) for heads in (num_heads, num_kv_heads, num_kv_heads)]
        states = [
            torch.randn(shape, device="cuda", generator=generator).bfloat16().requires_grad_() for shape in shapes
        ]
        results = []
        for on in (True, False):
            monkeypatch.setitem(overrides, "varlen", on)
            inputs = states if on else [part.float().detach().requires_grad_() for part in states]
            context, _ = module.packed_attention_forward(None, *inputs, None, 128**-0.5, sequences=sequences)
            grads = torch.autograd.grad(context.float().square().sum(), inputs)
            results.append([context, *grads])
        for found, expected in zip(*results, strict=True):
            assert (found.float() - expected).abs().max() / expected.abs().max() < 2e-2
