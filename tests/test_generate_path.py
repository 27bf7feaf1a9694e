"""transformers' own `generate` on the decode path: the same ids as its own loop, whatever a caller asks for.

The reference kernels stand in for the CUDA kernels on a CPU; the same tests run with the kernels on a GPU.
"""
# ruff: noqa: F811  # fixtures of another file are arguments here

import functools
import logging

import pytest
import torch
from transformers import (
    GenerationMixin,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from glm_utils.checkpoint import open_checkpoint
from tests.test_decoding import (  # noqa: F401  # fixtures
    QUERY,
    load,
    prompts,
    reference_kernels,
    same_answers,
    sibling,
    tiny_dir,
)

TEXTS = [QUERY, "你好", "类型#裙*风格#复古"]


class Chunks(BaseStreamer):
    """Keep what a streamer is given."""

    def __init__(self):
        self.chunks, self.has_ended = [], False

    def put(self, value):
        assert value.device.type == "cpu"
        self.chunks.append(value.clone())

    def end(self):
        self.has_ended = True


class EndAfter(StoppingCriteria):
    """End each sequence when it holds a number of tokens of its own, and keep count of the calls."""

    def __init__(self, lengths):
        self.lengths, self.calls = lengths, []

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append(input_ids.shape[1])
        return torch.tensor([input_ids.shape[1] >= length for length in self.lengths], device=input_ids.device)


def pair(model, tokenizer, texts, make_settings, reference_kernels):
    """Return what the decode path and transformers' loop generate for the same settings, made anew for each."""
    ids, mask = prompts(tokenizer, texts, model.device)
    given = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 24}
    reference_kernels.DecodeGraph.forget(model)
    fast = model.generate(ids, **given, **make_settings(ids))
    assert model in reference_kernels.DecodeGraph._idle, "the decode path was not taken"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "_sample", GenerationMixin._sample, raising=False)
        slow = model.generate(ids, **given, **make_settings(ids))
    return fast, slow


SETTINGS = {
    "greedy": {},
    "no end token": {"eos_token_id": [], "pad_token_id": 0},
    "several end tokens": {"eos_token_id": [2, 100, 300, 700]},
    "repetition penalty": {"repetition_penalty": 1.7},
    "no repeated bigram": {"no_repeat_ngram_size": 2},
    "least length": {"min_new_tokens": 20},
    "most time": {"max_time": 1e9},
}


@pytest.mark.parametrize("num_prompts", [1, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_ids_are_those_of_transformers(load, tiny_dir, reference_kernels, name, num_prompts):
    model, tokenizer = load("float16", "cpu"), open_checkpoint(tiny_dir).tokenizer
    fast, slow = pair(model, tokenizer, TEXTS[:num_prompts], lambda ids: SETTINGS[name], reference_kernels)
    assert fast.shape == slow.shape
    assert same_answers(model, fast, slow, prompts(tokenizer, TEXTS[:num_prompts])[0].shape[1])


def test_what_callers_bring(load, tiny_dir, reference_kernels):
    """A streamer, stopping criteria that see each token once, and logits processors that see all ids."""
    model, tokenizer = load("float16", "cpu"), open_checkpoint(tiny_dir).tokenizer
    made = []

    def settings(ids):
        width = ids.shape[1]
        criterion = EndAfter([width + 5, width + 9, width + 7][: len(ids)])
        streamer = Chunks() if len(ids) == 1 else None
        made.append((criterion, streamer))
        return {
            "stopping_criteria": StoppingCriteriaList([criterion]),
            "logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)]),
            **({"streamer": streamer} if streamer else {}),
        }

    for texts in (TEXTS[:1], TEXTS):
        fast, slow = pair(model, tokenizer, texts, settings, reference_kernels)
        assert torch.equal(fast, slow)
        (mine, my_stream), (theirs, their_stream) = made
        assert mine.calls == theirs.calls
        if my_stream:
            assert my_stream.has_ended
            assert torch.equal(torch.cat([chunk.flatten() for chunk in my_stream.chunks]), fast[0])
            for one, other in zip(my_stream.chunks, their_stream.chunks, strict=True):
                assert torch.equal(one, other)
        made.clear()


def test_scores_and_cache(load, tiny_dir, reference_kernels):
    """return_dict_in_generate: scores, logits and a cache that goes on as transformers' own does."""
    model, tokenizer = load("float16", "cpu"), open_checkpoint(tiny_dir).tokenizer
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "top_k": 5}
    for texts in (TEXTS[:1], TEXTS):
        fast, slow = pair(model, tokenizer, texts, lambda ids: asked, reference_kernels)
        assert torch.equal(fast.sequences, slow.sequences)
        ids, _ = prompts(tokenizer, texts)
        num_new = fast.sequences.shape[1] - ids.shape[1]
        for name in ("scores", "logits"):
            mine, theirs = getattr(fast, name), getattr(slow, name)
            assert len(mine) == len(theirs) == num_new
            for one, other in zip(mine, theirs, strict=True):
                assert torch.equal(one.isinf(), other.isinf())
                torch.testing.assert_close(one, other, rtol=0.02, atol=0.05)
        assert fast.past_key_values.get_seq_length() == slow.past_key_values.get_seq_length()
        for mine, theirs in zip(fast.past_key_values.layers, slow.past_key_values.layers, strict=True):
            kept = prompts(tokenizer, texts)[1][:, None, :, None].bool()  # padding columns hold anything
            width = kept.shape[2]
            for one, other in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                torch.testing.assert_close(one[:, :, :width] * kept, other[:, :, :width] * kept, rtol=0.02, atol=0.05)
                torch.testing.assert_close(one[:, :, width:], other[:, :, width:], rtol=0.02, atol=0.05)


def test_sampling_has_the_same_distribution(load, tiny_dir, reference_kernels):
    """The first two tokens of 400 draws, by the decode path and by transformers' loop."""
    model, tokenizer = load("float16", "cpu"), open_checkpoint(tiny_dir).tokenizer
    ids, mask = prompts(tokenizer, [TEXTS[2]] * 16)
    asked = {"attention_mask": mask, "do_sample": True, "temperature": 1.5, "top_k": 6, "max_new_tokens": 2}
    torch.manual_seed(0)
    counts = []
    for custom in (None, GenerationMixin._sample):
        drawn = [model.generate(ids, custom_generate=custom, **asked)[:, -2:] for _ in range(25)]
        counts.append(torch.cat(drawn).unique(dim=0, return_counts=True))
    total = sum(int(number.sum()) for _, number in counts) // 2
    found = [
        {tuple(row): int(number) / total for row, number in zip(*(part.tolist() for part in count), strict=True)}
        for count in counts
    ]
    distance = sum(abs(found[0].get(key, 0) - found[1].get(key, 0)) for key in {**found[0], **found[1]}) / 2
    num_kinds = len({**found[0], **found[1]})
    # the total variation between two samples of one distribution stays below this in all but one of 1,000 cases
    assert distance < 0.5 * (2 * num_kinds / total) ** 0.5 + 0.05


@pytest.mark.parametrize(
    "asked",
    [{"output_attentions": True}, {"output_hidden_states": True}, {"use_cache": False}, {"num_beams": 2}],
    ids=str,
)
def test_the_rest_goes_through_transformers(load, tiny_dir, reference_kernels, asked):
    model, tokenizer = load("float16", "cpu"), open_checkpoint(tiny_dir).tokenizer
    model.set_attn_implementation("eager")
    ids, mask = prompts(tokenizer, TEXTS[:1])
    reference_kernels.DecodeGraph.forget(model)
    output = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=4, return_dict_in_generate=True, **asked
    )
    assert model not in reference_kernels.DecodeGraph._idle
    assert output.sequences.shape[1] > ids.shape[1]
    if "output_hidden_states" in asked:
        assert len(output.hidden_states) == output.sequences.shape[1] - ids.shape[1]


def test_a_cache_of_the_callers_goes_on(load, tiny_dir, reference_kernels, family_name):
    """A second call behind the cache that the first one returned gives what one longer call gives."""
    model, tokenizer = load("float16", "cpu"), open_checkpoint(tiny_dir).tokenizer
    ids, _ = prompts(tokenizer, TEXTS[:1])
    asked = {"do_sample": False, "eos_token_id": [], "pad_token_id": 0, "return_dict_in_generate": True}
    whole = model.generate(ids, max_new_tokens=12, **asked).sequences
    first = model.generate(ids, max_new_tokens=5, **asked)
    positions = {}
    if family_name == "chatglm-6b":  # whose positions depend on where the prompt ends
        positions = {"position_ids": model._prompt_positions(ids, None, 0)}
    second = model.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=7, **positions, **asked
    )
    assert torch.equal(second.sequences, whole)


def test_the_reason_is_said_once(load, tiny_dir, reference_kernels, monkeypatch, caplog):
    model, tokenizer = load("float16", "cpu"), open_checkpoint(tiny_dir).tokenizer
    monkeypatch.setattr(sibling(type(model), "generation_chatglm"), "REASONS_SAID", set())
    ids, mask = prompts(tokenizer, [QUERY] * 17)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=3)
    said = [record.message for record in caplog.records if "17 sequences, more than" in record.message]
    assert len(said) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["float16", "int8", "int4", "nf4", "lora"])
def test_ids_on_a_gpu(load, tiny_dir, weights):
    """Greedy ids of generate are those of stream_generate and, up to the answer's end, of transformers' loop."""
    model, tokenizer = load(weights, "cuda"), open_checkpoint(tiny_dir).tokenizer
    ids, mask = prompts(tokenizer, TEXTS, "cuda")
    asked = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 48}
    fast = model.generate(ids, **asked)
    assert model in sibling(type(model), "decoding_chatglm").DecodeGraph._idle
    *_, streamed = model.stream_generate(ids, **asked)
    assert torch.equal(fast, streamed)
    slow = model.generate(ids, custom_generate=GenerationMixin._sample, **asked)
    width = min(fast.shape[1], slow.shape[1])
    assert (fast[:, :width] == slow[:, :width]).float().mean() > 0.9  # a tie may part them
    scores = model.generate(ids, return_dict_in_generate=True, output_scores=True, **asked)
    assert torch.equal(scores.sequences, fast)
    picked = torch.stack(scores.scores, dim=1).argmax(-1)
    ends = torch.cumsum(fast[:, ids.shape[1] :] == model.config.eos_token_id, dim=1)
    is_answer = torch.nn.functional.pad(ends[:, :-1] == 0, (1, 0), value=True)
    assert torch.equal(picked[is_answer], fast[:, ids.shape[1] :][is_answer])


@pytest.mark.parametrize("family_name", ["chatglm2-6b"], indirect=True)
def test_a_stream_behind_a_cache_counts_its_positions_on(load, tiny_dir, monkeypatch):
    """The new tokens alone, with no mask, one of them, or one of all tokens."""
    model, tokenizer = load("float16", "cpu"), open_checkpoint(tiny_dir).tokenizer
    ids, _ = prompts(tokenizer, TEXTS[:1])
    num_past, seen, forward = ids.shape[1] - 3, [], type(model).forward

    @functools.wraps(forward)  # `generate` looks at the signature
    def note(model, *args, position_ids=None, **kwargs):
        seen.append(position_ids.tolist())
        return forward(model, *args, position_ids=position_ids, **kwargs)

    for width in (None, ids.shape[1]):
        cache = model(ids[:, :num_past], use_cache=True).past_key_values
        mask = {} if width is None else {"attention_mask": torch.ones(1, width, dtype=torch.long)}
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "forward", note)
            list(model.stream_generate(ids[:, num_past:], past_key_values=cache, max_new_tokens=2, **mask))
        assert seen == [[[num_past, num_past + 1, num_past + 2]], [[num_past + 3]]]
        seen.clear()


def test_criteria_of_the_callers_class(load, tiny_dir, reference_kernels):
    """A length of the caller's stands above max_length, and classes derived from transformers' own are asked."""
    model, tokenizer = load("float16", "cpu"), open_checkpoint(tiny_dir).tokenizer

    class Never(EosTokenCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= width + 7)

    width = prompts(tokenizer, TEXTS[:1])[0].shape[1]
    for criterion, num_new in ((MaxLengthCriteria(width + 3), 3), (Never(5), 7)):
        settings = {"stopping_criteria": StoppingCriteriaList([criterion]), "eos_token_id": None}
        fast, slow = pair(model, tokenizer, TEXTS[:1], lambda ids, settings=settings: settings, reference_kernels)
        assert fast.shape == slow.shape == (1, width + num_new)


def test_ids_of_32_bits_and_contiguous_results(load, tiny_dir, reference_kernels):
    model, tokenizer = load("float16", "cpu"), open_checkpoint(tiny_dir).tokenizer
    ids, mask = prompts(tokenizer, TEXTS)
    asked = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 60}
    wide, narrow = model.generate(ids, **asked), model.generate(ids.int(), **asked)
    assert torch.equal(wide, narrow)
    assert narrow.dtype == torch.long
    assert wide.is_contiguous()
    assert wide.untyped_storage().nbytes() == wide.numel() * 8


def test_a_static_cache_is_left_to_the_forward_pass(load, tiny_dir, reference_kernels):
    model, tokenizer = load("float16", "cpu"), open_checkpoint(tiny_dir).tokenizer
    ids, _ = prompts(tokenizer, TEXTS[:1])
    reference_kernels.DecodeGraph.forget(model)
    asked = {"do_sample": False, "max_new_tokens": 4}
    *_, streamed = model.stream_generate(ids, cache_implementation="static", **asked)
    assert model not in reference_kernels.DecodeGraph._idle
    assert streamed.shape[1] > ids.shape[1]


def test_nan_that_a_setting_repairs_is_no_error(load, tiny_dir):
    model, tokenizer = load("float16", "cpu"), open_checkpoint(tiny_dir).tokenizer
    ids, _ = prompts(tokenizer, TEXTS[:1])
    model.get_output_embeddings().weight.data[7] = float("nan")
    asked = {"do_sample": True, "max_new_tokens": 2}
    with pytest.raises(FloatingPointError):
        model.generate(ids, **asked)
    assert model.generate(ids, remove_invalid_values=True, **asked).shape[1] == ids.shape[1] + 2


@pytest.mark.gpu
def test_ids_on_the_cpu_for_a_model_on_a_gpu(load, tiny_dir):
    model, tokenizer = load("float16", "cuda"), open_checkpoint(tiny_dir).tokenizer
    ids, mask = prompts(tokenizer, TEXTS[:1])
    given = {"do_sample": False, "max_new_tokens": 8}
    assert model.generate(ids, attention_mask=mask, **given).shape[1] > ids.shape[1]
