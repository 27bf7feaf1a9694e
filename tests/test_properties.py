"""Properties over random shapes, ranks, targets and texts; `make test-slow` tries more of each, from its seed."""

import contextlib
import functools
import json
import shutil
import tempfile
from pathlib import Path

import gguf
import hypothesis
import numpy as np
import peft
import pytest
import torch
from hypothesis import strategies
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from glm_utils.adapter import read_adapter
from glm_utils.checkpoint import open_checkpoint
from glm_utils.cli import UserError
from glm_utils.collators import Collator, PackingCollator
from glm_utils.data import Example
from glm_utils.device import resolve_device
from glm_utils.encoding import IGNORED_LABEL, EncodingLimits, encode_examples
from glm_utils.export import EXPORTS
from glm_utils.load_model import load_base_model
from glm_utils.merging.job import make_job
from tests.conftest import FAMILY_BY_NAME, FIXTURES_DIR
from tests.fresh_scripts import load_script
from tests.test_export_gguf import gguf_name

Q = load_script("quantization")
FAMILY_NAMES = strategies.sampled_from(sorted(FAMILY_BY_NAME))
SEEDS = strategies.integers(0, 2**31)


@functools.cache
def golden(family_name):
    """Return a family's golden checkpoint and model, loaded once."""
    checkpoint = open_checkpoint(FIXTURES_DIR / family_name / "model")
    return checkpoint, load_base_model(checkpoint).eval()


# ---- quantizing: what is stored comes back


@strategies.composite
def weights(draw):
    """Weights of any scale, with rows of zeros and of one value among them."""
    rows, columns = draw(strategies.integers(1, 9)), 2 * draw(strategies.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    weight = torch.randn(rows, columns, generator=generator) * 10 ** draw(strategies.floats(-3, 2))
    if draw(strategies.booleans()):
        weight[draw(strategies.integers(0, rows - 1))] = draw(strategies.sampled_from((0.0, 1.0, -0.02)))
    return weight.to(draw(strategies.sampled_from((torch.float16, torch.float32))))


def check_quantizing(weight, bits, method):
    stored, scale = Q.quantize_rows(weight, bits, method)
    codes = Q.unpack_int4(stored) if bits == 4 else stored
    assert (stored.shape, codes.shape) == ((weight.shape[0], weight.shape[1] * bits // 8), weight.shape)
    if bits == 4:
        assert codes.min() >= -8
        assert codes.max() <= 7
        assert torch.equal(Q.pack_int4(codes), stored)
    found = Q.dequantize_rows(stored, scale, bits, torch.float64)
    assert torch.equal(found, codes.double() * scale.double().unsqueeze(1))
    # within half a step; a scale in fp16 is off by 2^-11 of itself, 2^-25 where it is subnormal, times the code
    exact, largest = weight.double(), codes.double().abs().max()
    if method == "absmax":
        rounding = scale.double() * 2**-10 + 2**-24
        assert ((found - exact).abs() <= (scale.double() / 2 + rounding * (largest + 1)).unsqueeze(1)).all()
    else:
        plain = Q.dequantize_rows(*Q.quantize_rows(weight, bits, "absmax"), bits, torch.float64)
        errors = [(values - exact).square().sum(1) for values in (found, plain)]
        assert (errors[0] <= errors[1] * (1 + 1e-6) + 1e-30).all()
    last = Q.quantize_rows(weight[-1:], bits, method)  # a row does not depend on its neighbors
    assert all(torch.equal(part, whole[-1:]) for part, whole in zip(last, (stored, scale), strict=True))


# ---- packing: the same loss and gradients as with padding


@strategies.composite
def batches(draw):
    """Examples of random lengths: (tokens, tokens of the prompt)."""
    lengths = draw(strategies.lists(strategies.tuples(strategies.integers(3, 24), SEEDS), min_size=1, max_size=6))
    return [(length, 2 + seed % (length - 2), seed) for length, seed in lengths]


def make_examples(config, lengths):
    """Return encoded examples of the family's form, with random ids."""
    examples = []
    for length, num_prompt, seed in lengths:
        ids = torch.randint(10, 200, (length,), generator=torch.Generator().manual_seed(seed))
        if hasattr(config, "gmask_token_id"):  # the prompt is bidirectional up to them
            ids[num_prompt - 2], ids[num_prompt - 1] = config.gmask_token_id, config.bos_token_id
        labels = torch.where(torch.arange(length) < num_prompt, IGNORED_LABEL, ids)
        examples.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return examples


def loss_and_gradients(model, batch):
    """Return the summed loss of a batch and its gradients."""
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=1).loss
    loss.backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return loss.item(), found


def check_packing(family_name, lengths, frozen_output):
    checkpoint, model = golden(family_name)
    model.get_output_embeddings().requires_grad_(not frozen_output)
    examples = make_examples(model.config, lengths)
    collators = PackingCollator(), Collator(checkpoint.tokenizer.pad_token_id, checkpoint.family.padding_side)
    (loss, found), (padded_loss, expected) = (loss_and_gradients(model, collator(examples)) for collator in collators)
    # fp32: sums of some hundred terms in another order
    assert loss == pytest.approx(padded_loss, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 2e-5 * gradient.abs().max().clamp(min=1e-4), name


# ---- one prompt builder: what is trained is what chat feeds


PIECES = ("[gMASK]", "<sop>", "</s>", "<eop>", "[Round 1]", "\n\n问：", "答：", "你好", " ", "\n", "<n>", "<|tab|>")
TEXTS = strategies.text(strategies.characters(exclude_categories=["Cs"]), max_size=12)
TEXTS |= strategies.lists(strategies.sampled_from(PIECES), max_size=8).map("".join)


class FirstForward(Exception):
    """The prompt has reached the model."""


def fed_ids(model, tokenizer, query, history, stream):
    """Return the ids of the first forward of chat or stream_chat."""
    fed = []

    def stop(module, args, kwargs):
        fed.extend(kwargs.get("input_ids", args[0] if args else None)[0].tolist())
        raise FirstForward

    handle = model.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with contextlib.suppress(FirstForward):
            if stream:
                next(model.stream_chat(tokenizer, query, history, max_length=4096, do_sample=False))
            else:
                model.chat(tokenizer, query, history, max_length=4096, do_sample=False)
    finally:
        handle.remove()
    return fed


def check_prompts(family_name, query, history, answer):
    checkpoint, model = golden(family_name)
    tokenizer = checkpoint.tokenizer
    prompt_ids = tokenizer.encode_prompt(query, history)
    assert fed_ids(model, tokenizer, query, history, stream=True) == prompt_ids
    assert fed_ids(model, tokenizer, query, history, stream=False) == prompt_ids
    example = Example(query, answer, tuple(history), "here:1")
    encoded = encode_examples([example], tokenizer, EncodingLimits(4096, 4096)).dataset[0]
    assert encoded["input_ids"] == prompt_ids + tokenizer.encode_answer(answer)
    assert encoded["labels"] == [IGNORED_LABEL] * len(prompt_ids) + tokenizer.encode_answer(answer)


# ---- merging: the adapter's update, rounded to fp16 once


@strategies.composite
def lora_settings(draw, family_name):
    """Settings of peft.LoraConfig that a merge supports, with patterns of ranks and alphas."""
    names = sorted(FAMILY_BY_NAME[family_name].linear_names)
    targets = draw(strategies.lists(strategies.sampled_from(names), min_size=1, unique=True))
    ranks, alphas = strategies.integers(1, 9), strategies.integers(1, 64)
    return {
        "r": draw(ranks),
        "lora_alpha": draw(alphas),
        "target_modules": targets,
        "use_rslora": draw(strategies.booleans()),
        "rank_pattern": draw(strategies.dictionaries(strategies.sampled_from(targets), ranks, max_size=2)),
        "alpha_pattern": draw(strategies.dictionaries(strategies.sampled_from(targets), alphas, max_size=2)),
    }


FAMILY_AND_LORA = FAMILY_NAMES.flatmap(lambda name: strategies.tuples(strategies.just(name), lora_settings(name)))


def write_adapter(base_dir, directory, settings, seed):
    """Write an adapter with random weights through peft; return the model merged by peft, in fp32."""
    model = load_base_model(open_checkpoint(base_dir))
    model.name_or_path = str(base_dir)
    torch.manual_seed(seed)
    model = peft.get_peft_model(model, peft.LoraConfig(**settings, init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.mul_(0.2)
    model.save_pretrained(directory)
    return model.merge_and_unload()


def check_merging(family_and_lora, seed):
    family_name, settings = family_and_lora
    base = open_checkpoint(FIXTURES_DIR / family_name / "model")
    with tempfile.TemporaryDirectory() as directory:
        expected = write_adapter(base.directory, Path(directory), settings, seed).state_dict()
        job = make_job(read_adapter(Path(directory)), base, 0, resolve_device("cpu"), None, "original")
        for name in job.specs():
            (found,) = job.merge_tensor(name).values()
            assert found.dtype == torch.float16
            if name not in expected:  # buffers of published files
                continue
            # peft sums in fp32 too, in another order, before the same rounding: at most the neighbor in fp16
            step = torch.maximum(expected[name].abs() * 2**-10, torch.tensor(2.0**-24))
            assert ((found.float() - expected[name]).abs() <= step).all(), name


# ---- exports: the merged weights under other names


@strategies.composite
def shapes(draw):
    """Keys of config.json of a small ChatGLM2: heads, groups, widths and biases."""
    groups, per_group = draw(strategies.integers(1, 3)), draw(strategies.integers(1, 3))
    num_channels = draw(strategies.sampled_from((8, 16, 32)))
    hidden_sizes = strategies.just(groups * per_group * num_channels) | strategies.integers(2, 8).map(lambda n: 8 * n)
    return {
        "num_layers": draw(strategies.integers(1, 3)),
        "num_attention_heads": groups * per_group,
        "multi_query_attention": draw(strategies.booleans()),
        "multi_query_group_num": groups,
        "kv_channels": num_channels,
        "hidden_size": draw(hidden_sizes),
        "ffn_hidden_size": 4 * draw(strategies.integers(2, 20)),
        "add_qkv_bias": draw(strategies.booleans()),
        "layernorm_epsilon": draw(strategies.sampled_from((1e-5, 1e-3))),
    }


def write_base(directory, shape, seed):
    """Write a ChatGLM2 of a shape with random fp16 weights."""
    source = FIXTURES_DIR / "chatglm2-6b" / "model"
    directory.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(source / name, directory / name)
    values = {**json.loads((source / "config.json").read_text()), **shape}
    (directory / "config.json").write_text(json.dumps(values))
    torch.manual_seed(seed)
    _, model = golden("chatglm2-6b")
    model = type(model)(model.config.from_dict(values))
    for parameter in model.parameters():  # biases and norms too
        parameter.data = (parameter.data + 0.05 * torch.randn_like(parameter)).half().float()
    save_file(model.state_dict(), directory / "model.safetensors", {"format": "pt"})


def check_exports(shape, settings, seed):
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_base(directory / "base", shape, seed)
        write_adapter(directory / "base", directory / "adapter", settings, seed)
        adapter, base = read_adapter(directory / "adapter"), open_checkpoint(directory / "base")
        for export_format in ("chatglm", "glm", "gguf"):
            job = make_job(adapter, base, 0, resolve_device("cpu"), None, "original")
            if export_format == "gguf" and shape["hidden_size"] != shape["num_attention_heads"] * shape["kv_channels"]:
                with pytest.raises(UserError, match="hidden_size is .* which llama.cpp does not compute"):
                    EXPORTS[export_format].check(job)
                continue
            (directory / export_format).mkdir()
            EXPORTS[export_format].check(job)
            EXPORTS[export_format].write(job, directory / export_format)
        if (directory / "gguf").is_dir():
            compare_gguf(load_file(directory / "chatglm" / "model.safetensors"), directory / "gguf" / "model.gguf")
        ids = torch.randint(10, 200, (2, 9), generator=torch.Generator().manual_seed(seed))
        ours = load_base_model(open_checkpoint(directory / "chatglm")).eval()
        native = AutoModelForCausalLM.from_pretrained(directory / "glm", dtype=torch.float32).eval()
        with torch.no_grad():
            expected, found = (model(input_ids=ids, use_cache=False).logits for model in (ours, native))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)  # fp32, another order of sums


def compare_gguf(merged, path):
    """A GGUF file holds the merged tensors, shape and bits, under its names."""
    merged = {gguf_name(key): tensor for key, tensor in merged.items() if not key.endswith("inv_freq")}
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert found.keys() == merged.keys()
    for name, tensor in merged.items():
        assert found[name].data.shape == tuple(tensor.shape)
        assert np.array_equal(found[name].data.astype(np.float16), tensor.numpy())


# ---- all of them


PROPERTIES = {  # by name: the check, its strategies, and examples in make test (of 3 ms to 1 s each)
    "quantizing": (
        check_quantizing,
        {
            "weight": weights(),
            "bits": strategies.sampled_from((4, 8)),
            "method": strategies.sampled_from(("absmax", "search")),
        },
        60,
    ),
    "packing": (
        check_packing,
        {"family_name": FAMILY_NAMES, "lengths": batches(), "frozen_output": strategies.booleans()},
        30,
    ),
    "prompts": (
        check_prompts,
        {
            "family_name": FAMILY_NAMES,
            "query": TEXTS,
            "history": strategies.lists(strategies.tuples(TEXTS, TEXTS), max_size=4),
            "answer": TEXTS,
        },
        60,
    ),
    "merging": (check_merging, {"family_and_lora": FAMILY_AND_LORA, "seed": SEEDS}, 12),
    "exports": (check_exports, {"shape": shapes(), "settings": lora_settings("chatglm2-6b"), "seed": SEEDS}, 5),
}


def try_property(name, num_examples, seed):
    """Try a property on so many random examples.

    Raises:
        AssertionError: An example that does not have it; hypothesis has made it as small as it can.
    """
    check, values, _ = PROPERTIES[name]
    health = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]
    settings = hypothesis.settings(
        max_examples=num_examples, deadline=None, database=None, suppress_health_check=health
    )
    hypothesis.seed(seed)(settings(hypothesis.given(**values)(check)))()


@pytest.mark.parametrize("name", list(PROPERTIES))
def test_property(name):
    try_property(name, num_examples=PROPERTIES[name][2], seed=0)
