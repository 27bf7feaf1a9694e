"""The CUDA decode path: its wiring on the CPU with reference kernels, every kernel and all of it on a GPU."""

import copy
import gc
import sys
import weakref
from collections import deque

import peft
import pytest
import torch
from transformers import DynamicCache

from glm_utils.checkpoint import load_classes, open_checkpoint
from glm_utils.family import PROJECT_DIR
from glm_utils.inference.batch import PendingAnswer, run_batch
from glm_utils.load_model import load_base_model
from tests import decode_reference

TINY = {"chatglm-6b": "chatglm-tiny", "chatglm2-6b": "chatglm2-tiny"}
QUERY = "类型#上衣*材质#牛仔布*颜色#白色*风格#简约*图案#刺绣*衣样式#外套"
# Rounding to 11 or 8 bits once, after fp32 sums of products that are exact.
TOLERANCE = {torch.float16: 2**-10, torch.bfloat16: 2**-7}
WEIGHTS = ["float16", "bfloat16", "int8", "int4", "nf4", "lora", "nf4+lora"]
on_gpu = pytest.mark.gpu


def sibling(model_class, name):
    """Return the module of that name beside a model class."""
    return sys.modules[f"{model_class.__module__.rpartition('.')[0]}.{name}"]


@pytest.fixture
def tiny_dir(family_name):
    return PROJECT_DIR / "models" / TINY[family_name]


@pytest.fixture
def load(tiny_dir):
    """Load the trained tiny model with weights of a kind, optionally under a LoRA adapter with a visible effect."""

    def load_model(weights, device):
        dtype = "bf16" if weights == "bfloat16" else "fp16"
        settings = {"load_in_4bit": True} if weights.startswith("nf4") else {}
        model = load_base_model(open_checkpoint(tiny_dir), compute_dtype=dtype, device_map=device, **settings).eval()
        if weights.startswith("int"):
            model.quantize(int(weights[3:]))
        if weights.endswith("lora"):
            torch.manual_seed(7)
            targets = ["query_key_value", "dense_h_to_4h", "dense"]
            config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, init_lora_weights=False)
            model = peft.get_peft_model(model, config).eval().get_base_model()
        return model

    return load_model


@pytest.fixture
def reference_kernels(load, monkeypatch, family):
    """Put the reference kernels and plain calls in the place of the kernels and of graph capture."""
    model_class = load_classes(family).model
    decoding, generation = sibling(model_class, "decoding_chatglm"), sibling(model_class, "generation_chatglm")
    for name in ("matvec", "norm", "decode_attention", "attention_scratch"):
        monkeypatch.setattr(decoding, name, getattr(decode_reference, name))
    monkeypatch.setitem(sibling(model_class, "kernels_chatglm").OVERRIDES, "nvrtc", True)
    for module in (decoding, generation, sibling(model_class, "batching_chatglm")):
        monkeypatch.setattr(module, "capture", lambda function, device: function)

    def send(steps):
        arrived = type("Arrived", (), {"synchronize": lambda self: None})()
        return steps.status.clone(), arrived, steps.sampler.num_ids

    monkeypatch.setattr(generation.GraphSteps, "_send", send)
    return decoding


def prompts(tokenizer, texts, device="cpu"):
    """Encode prompts and pad them on the left."""
    encoded = [tokenizer.encode_prompt(text) for text in texts]
    width = max(map(len, encoded))
    ids = [[tokenizer.pad_token_id] * (width - len(prompt)) + prompt for prompt in encoded]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in encoded]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def greedy(model, ids, mask, num_new, **settings):
    """Return all ids that stream_generate yields, one tensor a step."""
    settings = {"max_new_tokens": num_new, "do_sample": False, "eos_token_id": [], **settings}
    if ids.shape[0] > 1:
        settings["attention_mask"] = mask
    return [step.clone() for step in model.stream_generate(ids, **settings)]


def same_steps(fast, slow):
    """Say whether two lists of ids are the same, step by step."""
    return len(fast) == len(slow) and all(torch.equal(one, other) for one, other in zip(fast, slow, strict=True))


def same_answers(model, fast, slow, num_prompt):
    """Say whether ids (B, T + n) agree up to each answer's end token; what follows it is off the model's training."""
    ends = torch.cumsum(slow[:, num_prompt:] == model.config.eos_token_id, dim=1)
    is_answer = torch.nn.functional.pad(ends[:, :-1] == 0, (1, 0), value=True)
    return bool((fast == slow)[:, num_prompt:][is_answer].all())


@pytest.mark.parametrize("weights", WEIGHTS)
def test_wiring(load, tiny_dir, reference_kernels, weights):
    """With reference kernels the decode path gives the ids of the model's forward, also padded and batched."""
    model, tokenizer = load(weights, "cpu"), open_checkpoint(tiny_dir).tokenizer
    for texts in ([QUERY], [QUERY, "类型#裙*颜色#红色"]):
        ids, mask = prompts(tokenizer, texts)
        slow = greedy(model, ids, mask, 12, use_cuda_graph=False)
        fast = greedy(model, ids, mask, 12)
        assert model in reference_kernels.DecodeGraph._idle
        assert same_steps(fast, slow)


def test_growing_context(load, tiny_dir, reference_kernels, monkeypatch):
    """The cache grows in the middle of an answer."""
    model, tokenizer = load("float16", "cpu"), open_checkpoint(tiny_dir).tokenizer
    ids, mask = prompts(tokenizer, [QUERY])
    monkeypatch.setattr(reference_kernels, "MIN_SLOTS", 8)
    fast = greedy(model, ids, mask, 40)
    graph = reference_kernels.DecodeGraph._idle[model]
    assert graph.slots > 32 + ids.shape[1] - 8
    assert same_steps(fast, greedy(model, ids, mask, 40, use_cuda_graph=False))


def test_graph_is_reused_until_weights_change(load, tiny_dir, reference_kernels):
    """A second prompt takes the same graph; new weights, or an adapter that is switched off, make another."""
    model, tokenizer = load("lora", "cpu"), open_checkpoint(tiny_dir).tokenizer
    ids, mask = prompts(tokenizer, [QUERY])

    def graph():
        greedy(model, ids, mask, 3)
        return reference_kernels.DecodeGraph._idle[model]

    first = graph()
    assert graph() is first
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.5)
    second = graph()
    assert second is not first
    lora_layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in lora_layers:
        layer.enable_adapters(False)
    assert graph() is not second
    assert same_steps(greedy(model, ids, mask, 8), greedy(model, ids, mask, 8, use_cuda_graph=False))


def test_a_graph_keeps_no_model_alive(load, tiny_dir, reference_kernels):
    """A model that is dropped goes, and its graph with it."""
    model, tokenizer = load("float16", "cpu"), open_checkpoint(tiny_dir).tokenizer
    ids, mask = prompts(tokenizer, [QUERY])
    greedy(model, ids, mask, 3)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert not reference_kernels.DecodeGraph._idle


def test_own_processors_see_no_token_behind_the_end(load, tiny_dir, reference_kernels):
    """A processor of the caller's is called once a token, with and without the decode path."""
    model, tokenizer = load("float16", "cpu"), open_checkpoint(tiny_dir).tokenizer
    ids, mask = prompts(tokenizer, [QUERY])
    eos = int(greedy(model, ids, mask, 10, use_cuda_graph=False)[-1][0, -1])
    lengths = {}
    for use_cuda_graph in (True, False):
        lengths[use_cuda_graph] = []

        def note(input_ids, scores, seen=lengths[use_cuda_graph]):
            seen.append(input_ids.shape[1])
            return scores

        settings = {"logits_processor": [note], "eos_token_id": eos, "use_cuda_graph": use_cuda_graph}
        greedy(model, ids, mask, 30, **settings)
    assert lengths[True] == lengths[False]
    assert lengths[True] == list(range(ids.shape[1], ids.shape[1] + len(lengths[True])))


def test_end_token_stops_each_sequence(load, tiny_dir, reference_kernels):
    """Sequences end where they end in the eager path, finished ones are padded, and the last token is yielded."""
    model, tokenizer = load("float16", "cpu"), open_checkpoint(tiny_dir).tokenizer
    ids, mask = prompts(tokenizer, [QUERY, "类型#裙*颜色#红色"])
    free = greedy(model, ids, mask, 30, use_cuda_graph=False)[-1][:, ids.shape[1] :]
    eos = [int(free[0, 9]), int(free[1, 17])]
    slow = greedy(model, ids, mask, 30, use_cuda_graph=False, eos_token_id=eos)
    assert len(slow) < 30
    assert same_steps(greedy(model, ids, mask, 30, eos_token_id=eos), slow)


def test_chat_and_stream_chat_agree(load, tiny_dir, reference_kernels):
    """Streaming ends in the answer that chat gives, with and without the decode path."""
    model, tokenizer = load("int8", "cpu"), open_checkpoint(tiny_dir).tokenizer
    settings = {"do_sample": False, "max_length": 120}
    answer, history = model.chat(tokenizer, QUERY, history=[], **settings)
    *_, (streamed, streamed_history) = model.stream_chat(tokenizer, QUERY, history=[], **settings)
    eager = [text for text, _ in model.stream_chat(tokenizer, QUERY, history=[], use_cuda_graph=False, **settings)]
    assert answer
    assert answer == streamed == eager[-1]
    assert history == streamed_history == [(QUERY, answer)]


@pytest.mark.parametrize("do_sample", [False, True])
def test_nan_logits_are_an_error(load, tiny_dir, reference_kernels, do_sample):
    """A NaN that appears behind the prompt ends the stream of a chat, with the token's place, and leaves no trace."""
    model, tokenizer = load("float16", "cpu"), open_checkpoint(tiny_dir).tokenizer
    ids, mask = prompts(tokenizer, [QUERY])
    expected = greedy(model, ids, mask, 8)
    graph = reference_kernels.DecodeGraph._idle[model]
    stream = model.stream_chat(tokenizer, QUERY, history=[], do_sample=do_sample, max_length=120)
    next(stream), next(stream)
    graph.caches[0][1].fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN or infinite logits at token"):
        list(stream)
    assert same_steps(greedy(model, ids, mask, 8), expected)


def test_sampling_follows_the_processors(load, tiny_dir, reference_kernels):
    """With top_k 1 sampling is greedy; other processors than those of the scores alone are still applied."""
    model, tokenizer = load("float16", "cpu"), open_checkpoint(tiny_dir).tokenizer
    ids, mask = prompts(tokenizer, [QUERY])
    slow = greedy(model, ids, mask, 10, use_cuda_graph=False)
    assert same_steps(greedy(model, ids, mask, 10, do_sample=True, top_k=1), slow)
    settings = {"repetition_penalty": 1.8}
    slow = greedy(model, ids, mask, 10, use_cuda_graph=False, **settings)
    assert same_steps(greedy(model, ids, mask, 10, **settings), slow)


def answers_of_batch(model, tokenizer, texts, batch_size, num_ahead, lengths=(3, 30, 11, 7, 19), **settings):
    """Return the ids of answers of given lengths, from a batch whose places are taken by the next prompt."""
    batch = model.continuous_batch(tokenizer, batch_size, 8, **settings)
    batch.num_ahead = num_ahead
    queue = deque(
        PendingAnswer(index, 0, tokenizer.encode_prompt(text), lengths[index % len(lengths)])
        for index, text in enumerate(texts)
    )
    answers = {one.index: one.token_ids for one in run_batch(batch, queue, set(), seed=5)}
    batch.close()
    return [answers[index] for index in range(len(texts))], batch


SAMPLINGS = [{"temperature": 0}, {"temperature": 1.5, "top_p": 0.95}]
TEXTS = ["类型#裙", QUERY, "类型#裙*颜色#红色", QUERY[:20], f"{QUERY}*{QUERY}", "类型#裤", "颜色#白色*风格#简约"]


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"temperature": 1.5, "top_p": 0.95}], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize("num_ahead", [0, 1])
def test_continuous_batch(load, tiny_dir, reference_kernels, monkeypatch, settings, num_ahead):
    """Places are taken by other prompts, moved and given more slots, and each answer is that of a batch of its own.

    Prompts come in any order here, so that one longer than all others meets a running batch.
    """
    model, tokenizer = load("float16", "cpu"), open_checkpoint(tiny_dir).tokenizer
    monkeypatch.setattr(reference_kernels, "MIN_SLOTS", 16)
    moves = []
    end_at = reference_kernels.SequenceSlots.end_at
    monkeypatch.setattr(
        reference_kernels.SequenceSlots, "end_at", lambda self, length: moves.append(length) or end_at(self, length)
    )
    slow, batch = answers_of_batch(model, tokenizer, TEXTS, 1, 0, use_cuda_graph=False, **settings)
    assert not batch.is_fast
    assert [len(ids) for ids in slow] == [3, 30, 11, 7, 19, 3, 30]
    moves.clear()
    fast, batch = answers_of_batch(model, tokenizer, TEXTS, 3, num_ahead, **settings)
    assert batch.is_fast
    assert batch.steps.slots >= 64
    assert len(moves) > 3
    assert reference_kernels.DecodeGraph._idle[model] is batch.steps
    assert fast == slow
    assert answers_of_batch(model, tokenizer, TEXTS, 3, num_ahead, use_cuda_graph=False, **settings)[0] == slow
    if not settings["temperature"]:
        for text, ids in zip(TEXTS, fast, strict=True):
            prompt, mask = prompts(tokenizer, [text])
            assert greedy(model, prompt, mask, len(ids))[-1][0, prompt.shape[1] :].tolist() == ids


def test_continuous_batch_refuses_settings_that_it_does_not_apply(load, tiny_dir):
    model, tokenizer = load("float16", "cpu"), open_checkpoint(tiny_dir).tokenizer
    for name, value in {"repetition_penalty": 1.5, "num_beams": 4, "no_repeat_ngram_size": 3}.items():
        model.generation_config.update(**{name: value})
        with pytest.raises(ValueError, match="generation_config.json asks for .*, which a batch does not apply"):
            model.continuous_batch(tokenizer, 2, 64)
        model.generation_config.update(**{name: None})
    with pytest.raises(ValueError, match="fewer than two tokens"):
        model.continuous_batch(tokenizer, 2, 64).prefill([[5]])


@pytest.mark.parametrize(
    "reason", ["fp32", "holes", "batch", "given cache", "final norm", "training", "hook", "positions"]
)
def test_what_is_not_covered_goes_through_the_model(load, tiny_dir, reference_kernels, reason):
    """Inputs that the path does not cover are answered without it, and equal."""
    model, tokenizer = load("float16", "cpu"), open_checkpoint(tiny_dir).tokenizer
    texts = [QUERY, QUERY] if reason != "batch" else [QUERY] * 17
    ids, mask = prompts(tokenizer, texts)
    settings = {}
    if reason == "fp32":
        model = model.float()
    if reason == "holes":
        mask[:, 2] = 0
    if reason == "given cache":
        settings["past_key_values"] = DynamicCache(config=model.config)
    if reason == "final norm":
        model.decode_parts().final_norm.float()
    if reason == "training":
        model.train()
    if reason == "hook":
        model.decode_parts().blocks[1].dense.register_forward_hook(lambda module, inputs, output: output * 0.5)
    if reason == "positions":
        positions = model._prompt_positions(ids, mask, 0)
        settings["position_ids"] = positions + 1000
    fast = greedy(model, ids, mask, 3, **settings)
    assert model not in reference_kernels.DecodeGraph._idle
    assert same_steps(fast, greedy(model, ids, mask, 3, use_cuda_graph=False))


def test_streams_at_once(load, tiny_dir, reference_kernels):
    """Streams of one model that run in turn have a graph each; a later stream takes one that was given back."""
    model, tokenizer = load("float16", "cpu"), open_checkpoint(tiny_dir).tokenizer
    inputs = [prompts(tokenizer, [text]) for text in (QUERY, "类型#裙*颜色#红色")]
    slow = [greedy(model, *each, 12, use_cuda_graph=False) for each in inputs]
    streams = [model.stream_generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=[]) for ids, _ in inputs]
    fast = [[], []]
    for _ in range(12):
        for steps, stream in zip(fast, streams, strict=True):
            steps.append(next(stream).clone())
    assert same_steps(fast[0], slow[0])
    assert same_steps(fast[1], slow[1])
    abandoned = model.stream_generate(inputs[0][0], max_new_tokens=12, do_sample=False, eos_token_id=[])
    next(abandoned), next(abandoned)
    assert model not in reference_kernels.DecodeGraph._idle
    assert same_steps(greedy(model, *inputs[1], 12), slow[1])
    abandoned.close()
    assert model in reference_kernels.DecodeGraph._idle


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_graph_survives_an_error(load, tiny_dir, reference_kernels, error):
    """An exception in the middle of a stream gives the graph back, fit for the next stream."""
    model, tokenizer = load("float16", "cpu"), open_checkpoint(tiny_dir).tokenizer
    ids, mask = prompts(tokenizer, [QUERY])
    calls = iter(range(100))

    def fail(input_ids, scores):
        if next(calls) == 4:
            raise error
        return scores

    with pytest.raises(error):
        greedy(model, ids, mask, 12, logits_processor=[fail])
    assert model in reference_kernels.DecodeGraph._idle
    assert same_steps(greedy(model, ids, mask, 12), greedy(model, ids, mask, 12, use_cuda_graph=False))


def test_chat_takes_the_decode_path(load, tiny_dir, reference_kernels):
    """The plain call does, with its default settings too, and one with other criteria; beam search does not."""
    model, tokenizer = load("float16", "cpu"), open_checkpoint(tiny_dir).tokenizer
    expected, _ = model.chat(tokenizer, QUERY, do_sample=False, max_length=90, use_cuda_graph=False)
    assert model not in reference_kernels.DecodeGraph._idle
    assert model.chat(tokenizer, QUERY, do_sample=False, max_length=90, num_beams=2)[0]
    assert model not in reference_kernels.DecodeGraph._idle
    for settings in ({}, {"num_return_sequences": 1, "max_time": 1e9}):
        assert model.chat(tokenizer, QUERY, do_sample=False, max_length=90, **settings)[0] == expected
        assert reference_kernels.DecodeGraph._idle.pop(model)


def test_weights_that_move_take_the_graph_along(load, tiny_dir, reference_kernels):
    """A graph that holds a model's old weights goes when they are cast, moved or quantized."""
    model, tokenizer = load("float16", "cpu"), open_checkpoint(tiny_dir).tokenizer
    ids, mask = prompts(tokenizer, [QUERY])
    for change in (lambda: model.to(torch.bfloat16), model.half, lambda: model.quantize(8)):
        greedy(model, ids, mask, 3)
        assert model in reference_kernels.DecodeGraph._idle
        change()
        assert model not in reference_kernels.DecodeGraph._idle
        assert same_steps(greedy(model, ids, mask, 8), greedy(model, ids, mask, 8, use_cuda_graph=False))


def test_a_graph_notices_the_scale_of_an_adapter(load, tiny_dir, reference_kernels):
    """The scale of a LoRA layer is a plain number; the graph multiplies it into its copy of B."""
    model, tokenizer = load("lora", "cpu"), open_checkpoint(tiny_dir).tokenizer
    ids, mask = prompts(tokenizer, [QUERY])
    greedy(model, ids, mask, 3)
    graph = reference_kernels.DecodeGraph._idle[model]
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scale_layer(0.25)
    assert same_steps(greedy(model, ids, mask, 12), greedy(model, ids, mask, 12, use_cuda_graph=False))
    assert reference_kernels.DecodeGraph._idle[model] is not graph


def test_inference_mode(load, tiny_dir, reference_kernels):
    """A graph made in inference mode is used again outside of it."""
    model, tokenizer = load("float16", "cpu"), open_checkpoint(tiny_dir).tokenizer
    ids, mask = prompts(tokenizer, [QUERY])
    with torch.inference_mode():
        inside = greedy(model, ids, mask, 8)
    graph = reference_kernels.DecodeGraph._idle[model]
    outside = greedy(model, ids, mask, 8)
    assert reference_kernels.DecodeGraph._idle[model] is graph
    assert same_steps(outside, inside)
    assert not graph.logits.requires_grad


def test_the_decode_path_is_tried_once(load, tiny_dir, reference_kernels, monkeypatch):
    """A model that it does not cover is not examined again after each token."""
    model, tokenizer = load("float16", "cpu").train(), open_checkpoint(tiny_dir).tokenizer
    ids, mask = prompts(tokenizer, [QUERY])
    tries = []
    monkeypatch.setattr(reference_kernels, "nvrtc_runs_on", lambda device: tries.append(device))
    greedy(model, ids, mask, 6)
    assert len(tries) == 1


def test_the_prompts_cache_is_freed(load, tiny_dir, reference_kernels, monkeypatch):
    """Keys and values of the prompt are held once, in the graph."""
    model, tokenizer = load("float16", "cpu"), open_checkpoint(tiny_dir).tokenizer
    ids, _ = prompts(tokenizer, [QUERY])
    caches, fill = [], reference_kernels.DecodeGraph.fill

    def note(graph, cache, *arguments):
        caches.append(weakref.ref(cache.layers[0].keys))
        fill(graph, cache, *arguments)

    monkeypatch.setattr(reference_kernels.DecodeGraph, "fill", note)
    stream = model.stream_generate(ids, max_new_tokens=4, do_sample=False)
    next(stream), next(stream)
    gc.collect()
    assert caches[0]() is None


def random_weight(kernels, kind, rows, columns, dtype, device):
    """Make a random Weight of a format."""
    if kind == "float":
        return kernels.Weight(kind, torch.randn(rows, columns, device=device, dtype=dtype) * 0.02, (rows, columns))
    bytes_per_row = columns if kind == "int8" else columns // 2
    data = torch.randint(-128, 128, (rows, bytes_per_row), device=device, dtype=torch.int8)
    if kind == "nf4":
        code = torch.sort(torch.randn(16, device=device))[0]
        scale = torch.cat((code, torch.rand(rows * columns // 64, device=device) * 0.05 + 0.01)).half()
        return kernels.Weight(kind, data.view(torch.uint8), (rows, columns), scale)
    return kernels.Weight(kind, data, (rows, columns), (torch.rand(rows, device=device) * 0.01 + 0.001).half())


def assert_close(out, expected, tolerance):
    """Compare with the relative error of the tensor as one; NaN fails."""
    error = (out.double() - expected.double()).norm() / expected.double().norm()
    assert error.item() <= tolerance, error.item()


@pytest.fixture
def kernels(family):
    return sibling(load_classes(family).model, "cuda_kernels")


@on_gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("kind", ["float", "int8", "int4", "nf4"])
def test_matvec(kernels, kind, dtype):
    """Every format and epilogue, 1 to 16 rows, sizes that fill no tile, with bias and LoRA."""
    torch.manual_seed(0)
    new = {"device": "cuda", "dtype": dtype}
    for rows, columns in ((208, 256), (1000, 4096), (96, 13696), (34, 64), (27392, 512)):
        weight = random_weight(kernels, kind, rows, columns, dtype, "cuda")
        weight.bias = torch.randn(rows, **new)
        lora = torch.randn(8, columns, **new) * 0.02, torch.randn(rows, 8, **new)
        for num_rows in (1, 3, 8, 9, 16):
            x, residual = torch.randn(num_rows, columns, **new), torch.randn(num_rows, rows, **new)
            for epilogue in kernels.EPILOGUES:
                for weight.lora_a, weight.lora_b in ((None, None), lora):
                    shape = (num_rows, rows // 2 if epilogue == "swiglu" else rows)
                    out, expected = (
                        torch.full(shape, torch.nan, **new),
                        torch.empty(shape, dtype=torch.float64, device="cuda"),
                    )
                    lora_t = torch.empty(num_rows, 8, device="cuda")
                    arguments = (x, weight), (epilogue, residual if epilogue == "residual" else None, 2.5, lora_t)
                    kernels.matvec(*arguments[0], out, *arguments[1])
                    decode_reference.matvec(*arguments[0], expected, *arguments[1])
                    assert_close(out, expected, TOLERANCE[dtype] * (2 if epilogue != "store" else 1))


@on_gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("two_d", "num_heads", "num_kv_heads"),  # ChatGLM-6B, two_d, has as many keys as queries
    [(False, 32, 2), (False, 4, 2), (False, 32, 32), (False, 3, 3), (True, 32, 32), (True, 3, 3)],
)
@pytest.mark.parametrize("clusters", ["as the GPU", "none"])
def test_decode_attention(kernels, monkeypatch, dtype, two_d, num_heads, num_kv_heads, clusters):
    """One split and many, padding, head sizes; the new key and value are stored; buffers are left fit for use."""
    if clusters == "none":  # as on GPUs before compute capability 9.0
        monkeypatch.setattr(kernels, "_has_clusters", lambda device: False)
    torch.manual_seed(0)
    new = {"device": "cuda", "dtype": dtype}
    for head_dim in (64, 128):
        angles = torch.rand(4096, head_dim // 4, device="cuda") * 6
        rotary = angles.cos().to(dtype), angles.sin().to(dtype)
        for batch, slots, length in (
            (1, 256, 0),
            (3, 256, 63),
            (1, 1024, 271),
            (2, 8192, 4200),
            (1, 8192, 8191),
            (16, 256, 255),
        ):
            cache = tuple(torch.randn(batch, num_kv_heads, slots, head_dim, **new) for _ in range(2))
            expected_cache = tuple(part.clone() for part in cache)
            width = 3 * num_heads if two_d else num_heads + 2 * num_kv_heads
            qkv = torch.randn(batch, width * head_dim, **new)
            positions = torch.randint(0, 4096, (batch, 2), device="cuda", dtype=torch.int32)
            starts = torch.randint(0, min(length, 5) + 1, (batch,), device="cuda", dtype=torch.int32)
            starts[-1] = max(0, length - 300) if batch > 1 else 0  # sequences of one launch differ in their splits
            slot = torch.tensor([length], device="cuda", dtype=torch.int32)
            scratch = kernels.attention_scratch(batch, num_kv_heads, slots, head_dim, torch.device("cuda"))
            expected = torch.empty(batch, num_heads * head_dim, dtype=torch.float64, device="cuda")
            decode_reference.decode_attention(
                qkv, expected_cache, rotary, positions, starts, slot, scratch, expected, two_d
            )
            for _ in range(2):
                out = torch.full(expected.shape, torch.nan, **new)
                kernels.decode_attention(qkv, cache, rotary, positions, starts, slot, scratch, out, two_d)
                assert_close(out, expected, 4 * TOLERANCE[dtype])  # query, probabilities and result are rounded
            for part, expected_part in zip(cache, expected_cache, strict=True):
                assert_close(part, expected_part, TOLERANCE[dtype])


@on_gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("columns", [104, 256, 4096, 16384])
def test_norm(kernels, dtype, columns):
    """RMSNorm and LayerNorm of rows with a mean."""
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(rows, columns, device="cuda", dtype=dtype) + 0.5 for rows in (5, 1, 1))
    for shift in (None, bias[0]):
        out, expected = torch.full_like(x, torch.nan), torch.empty_like(x, dtype=torch.float64)
        kernels.norm(x, weight[0], shift, 1e-5, out)
        decode_reference.norm(x, weight[0], shift, 1e-5, expected)
        assert_close(out, expected, TOLERANCE[dtype])


def assert_as_good_a_choice(model, mask, fast, slow):
    """Assert that every token of `fast` is the best one in fp32, up to what the model's own dtype loses.

    That is measured on `slow`, ids of the model's forward: both logits of a choice may be off by the largest error.
    """
    prompt = mask.shape[1]
    exact = copy.deepcopy(model).float()

    def logits(judge, ids):
        new = mask.new_ones(len(ids), ids.shape[1] - prompt - 1)
        keep = torch.cat((mask, new), dim=1)
        return judge(ids[:, :-1], attention_mask=keep).logits[:, prompt - 1 :].float()

    lost = (logits(model, slow) - logits(exact, slow)).abs().max()
    scores = logits(exact, fast)
    chosen = scores.gather(2, fast[:, prompt:, None])[..., 0]
    assert (scores.amax(dim=2) - chosen).max() <= 2 * lost


@on_gpu
@pytest.mark.parametrize("weights", WEIGHTS)
def test_greedy_ids_on_a_gpu(load, tiny_dir, weights):
    """The captured path gives the ids of the model's forward: alone, padded, across a growing cache."""
    model, tokenizer = load(weights, "cuda"), open_checkpoint(tiny_dir).tokenizer
    decoding = sibling(type(model), "decoding_chatglm")
    for texts in ([QUERY], [QUERY, "类型#裙*颜色#红色", "类型#裤"], [QUERY] * 16):
        ids, mask = prompts(tokenizer, texts, "cuda")
        fast = greedy(model, ids, mask, 40)
        assert model in decoding.DecodeGraph._idle
        slow = greedy(model, ids, mask, 40, use_cuda_graph=False)
        if weights == "bfloat16":  # logits of 8 bits tie: which of two equal tokens comes first is chance
            assert_as_good_a_choice(model, mask, fast[-1], slow[-1])
        elif weights == "int4":  # behind an answer's end the small models hesitate, and int4 matmuls round apart
            assert same_answers(model, fast[-1], slow[-1], ids.shape[1])
            assert_as_good_a_choice(model, mask, fast[-1], slow[-1])
        else:
            assert same_steps(fast, slow)


@on_gpu
def test_long_answers_on_a_gpu(load, tiny_dir):
    """400 tokens cross two cache sizes; the logits stay those of the model's forward within fp16."""
    model, tokenizer = load("float16", "cuda"), open_checkpoint(tiny_dir).tokenizer
    decoding = sibling(type(model), "decoding_chatglm")
    ids, mask = prompts(tokenizer, [QUERY], "cuda")
    fast = greedy(model, ids, mask, 600)[-1]
    graph = decoding.DecodeGraph._idle[model]
    assert graph.slots == 1024
    expected = model(fast[:, :-1]).logits[:, -1].float()
    assert_close(graph.logits, expected, 2e-2)


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_the_second_gpu(load, tiny_dir):
    """Kernels, captures and events are those of the model's device, whichever is current."""
    tokenizer = open_checkpoint(tiny_dir).tokenizer
    for device in ("cuda:0", "cuda:1"):
        model = load("int4", device)
        ids, mask = prompts(tokenizer, [QUERY], device)
        fast = greedy(model, ids, mask, 40, eos_token_id=[0])
        assert model in sibling(type(model), "decoding_chatglm").DecodeGraph._idle
        assert same_steps(fast, greedy(model, ids, mask, 40, eos_token_id=[0], use_cuda_graph=False))


@on_gpu
def test_streams_at_once_on_a_gpu(load, tiny_dir):
    """Two streams in turn give the ids that each gives alone."""
    model, tokenizer = load("int4", "cuda"), open_checkpoint(tiny_dir).tokenizer
    inputs = [prompts(tokenizer, [text], "cuda")[0] for text in (QUERY, "类型#裙*颜色#红色")]
    slow = [greedy(model, ids, None, 40, use_cuda_graph=False) for ids in inputs]
    streams = [model.stream_generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=[]) for ids in inputs]
    turns = [[step.clone() for step in steps] for steps in zip(*streams, strict=True)]
    for ids, fast, alone in zip(inputs, zip(*turns, strict=True), slow, strict=True):
        assert same_answers(model, fast[-1], alone[-1], ids.shape[1])
        assert_as_good_a_choice(model, torch.ones_like(ids), fast[-1], alone[-1])


@on_gpu
def test_chat_on_a_gpu(load, tiny_dir):
    """chat and stream_chat use the path, sample from it, and the same seed gives the same answer."""
    model, tokenizer = load("int4", "cuda"), open_checkpoint(tiny_dir).tokenizer
    settings = {"do_sample": False, "max_length": 160}
    eager, _ = model.chat(tokenizer, QUERY, history=[], use_cuda_graph=False, **settings)
    assert model.chat(tokenizer, QUERY, history=[], **settings)[0] == eager
    *_, (streamed, _) = model.stream_chat(tokenizer, QUERY, history=[], **settings)
    assert streamed == eager
    answers = []
    for seed in (1, 1, 2, 3):
        torch.manual_seed(seed)
        # The small models are sure of this answer: at lower temperatures every seed gives the same one.
        answers.append(model.chat(tokenizer, QUERY, history=[], max_length=160, temperature=20.0)[0])
    assert answers[0] == answers[1]
    assert len(set(answers)) > 1


@on_gpu
def test_nan_logits_on_a_gpu(load, tiny_dir):
    """NaN while sampling is this project's error and leaves the GPU fit for use: no assert on the device."""
    model, tokenizer = load("float16", "cuda"), open_checkpoint(tiny_dir).tokenizer
    ids, mask = prompts(tokenizer, [QUERY], "cuda")
    expected = greedy(model, ids, mask, 20)
    graph = sibling(type(model), "decoding_chatglm").DecodeGraph._idle[model]
    stream = model.stream_chat(tokenizer, QUERY, history=[], max_length=120)
    next(stream), next(stream)
    graph.caches[0][1].fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN or infinite logits at token"):
        list(stream)
    assert same_steps(greedy(model, ids, mask, 20), expected)


@on_gpu
def test_continuous_batch_on_a_gpu(load, tiny_dir):
    """Answers of many lengths from 16 places: each token is the best one, up to what fp16 loses."""
    model, tokenizer = load("float16", "cuda"), open_checkpoint(tiny_dir).tokenizer
    texts, lengths = TEXTS * 6, (40, 300, 10, 120)
    slow, _ = answers_of_batch(model, tokenizer, texts, 1, 1, lengths, temperature=0, use_cuda_graph=False)
    fast, batch = answers_of_batch(model, tokenizer, texts, 16, 1, lengths, temperature=0)
    assert batch.is_fast
    for text, *answers in zip(texts, fast, slow, strict=True):
        prompt, mask = prompts(tokenizer, [text], "cuda")
        both = [torch.cat((prompt, torch.tensor([ids], device="cuda")), dim=1) for ids in answers]
        assert_as_good_a_choice(model, mask, *both)


@on_gpu
@pytest.mark.parametrize("weights", ["int4", "nf4+lora"])
def test_sampled_continuous_batch_on_a_gpu(load, tiny_dir, weights):
    """The same answers in every run, whatever the order; the lengths are those that were asked for."""
    model, tokenizer = load(weights, "cuda"), open_checkpoint(tiny_dir).tokenizer
    texts, lengths = TEXTS * 6, (40, 300, 10, 120)
    first, batch = answers_of_batch(model, tokenizer, texts, 16, 1, lengths, temperature=1.5, top_p=0.95)
    again, _ = answers_of_batch(model, tokenizer, texts, 16, 1, lengths, temperature=1.5, top_p=0.95)
    assert batch.is_fast
    assert first == again
    assert [len(ids) for ids in first] == [lengths[index % 4] for index in range(len(texts))]
