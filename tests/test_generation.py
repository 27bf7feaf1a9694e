"""Generation, streaming and chat against the golden vectors, and the published faults that were put right."""

import inspect
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    StaticCache,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.test_modeling import LOGIT_TOLERANCE, assert_close, tensors

PROMPTS = ("p1", "p2", "p3")


def chat_golden(fixture_dir):
    """Load the golden chat file."""
    return json.loads((fixture_dir / "chat.json").read_text("utf-8"))


def history_of(golden, rounds):
    """Return the first rounds of the golden history as tuples."""
    return [tuple(turn) for turn in golden["history"][:rounds]]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_ids_with_every_cache(golden_model, fixture_dir, prompt):
    """Dynamic cache, static cache and no cache give the published ids (published v2 without cache went wrong)."""
    golden = tensors(fixture_dir, "generation.npz")
    ids, expected = golden[f"{prompt}.input_ids"][None], golden[f"{prompt}.generated_cache"]
    assert torch.equal(expected, golden[f"{prompt}.generated_no_cache"])
    settings = {"max_new_tokens": len(expected), "do_sample": False, "eos_token_id": None}
    static = StaticCache(config=golden_model.config, max_cache_len=ids.shape[1] + len(expected))
    for cache_settings in (
        {"past_key_values": DynamicCache(config=golden_model.config)},
        {"past_key_values": static},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ):
        generated = golden_model.generate(ids, **settings, **cache_settings)
        assert torch.equal(generated[0, ids.shape[1] :], expected), cache_settings


@pytest.mark.parametrize("prompt", PROMPTS)
def test_top_logits_of_every_step(golden_model, fixture_dir, prompt):
    """The five best logits of each cached step equal the published ones."""
    golden = tensors(fixture_dir, "generation.npz")
    out = golden_model.generate(
        golden[f"{prompt}.input_ids"][None],
        max_new_tokens=32,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    top = torch.cat(out.logits).topk(5)
    assert torch.equal(top.indices[:, 0], golden[f"{prompt}.top5_ids"][:, 0])
    assert_close(top.values, golden[f"{prompt}.top5_logits"])
    assert (golden[f"{prompt}.margin"] > 2 * LOGIT_TOLERANCE).all()


def test_left_padded_batch(golden_model, tokenizer, fixture_dir):
    """A batch from the tokenizer generates what each prompt generates alone; also under a static cache."""
    golden, batch = tensors(fixture_dir, "generation.npz"), tensors(fixture_dir, "batch_left_padded.npz")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    assert torch.equal(batch["input_ids"], golden["batch.input_ids"])
    expected = golden["batch.generated"]
    for extra in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        out = golden_model.generate(
            **inputs, max_new_tokens=expected.shape[1], do_sample=False, eos_token_id=None, **extra
        )
        assert torch.equal(out[:, batch["input_ids"].shape[1] :], expected), extra
    steps = list(
        golden_model.stream_generate(
            **inputs, max_new_tokens=expected.shape[1], max_length=None, do_sample=False, eos_token_id=None
        )
    )
    assert torch.equal(steps[-1][:, batch["input_ids"].shape[1] :], expected)


def test_stop_token_ends_sequences_and_streams(golden_model, fixture_dir):
    """Sequences end at eos and are filled with pad; the stream ends there too."""
    golden, batch = tensors(fixture_dir, "generation.npz"), tensors(fixture_dir, "batch_left_padded.npz")
    eos = golden["stop.eos_token_id"].item()
    settings = {"eos_token_id": eos, "do_sample": False, "pad_token_id": golden_model.config.pad_token_id}
    ids = golden["p1.input_ids"][None]
    out = golden_model.generate(ids, max_new_tokens=32, **settings)
    assert torch.equal(out[0, ids.shape[1] :], golden["stop.generate"])
    expected = golden["stop.batch_generate"]
    out = golden_model.generate(
        batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=expected.shape[1], **settings
    )
    assert torch.equal(out[:, batch["input_ids"].shape[1] :], expected)
    stream = list(golden_model.stream_generate(ids, max_new_tokens=32, **settings))
    assert torch.equal(stream[-1][0, ids.shape[1] :], golden["stop.generate"])


def test_stream_yields_every_token(golden_model, fixture_dir):
    """One step a token, the last one included: published ChatGLM-6B streaming lost it."""
    golden = tensors(fixture_dir, "generation.npz")
    ids, expected = golden["p1.input_ids"][None], golden["p1.generated_cache"]
    steps = list(golden_model.stream_generate(ids, max_length=ids.shape[1] + 32, do_sample=False, eos_token_id=None))
    lengths = [step.shape[1] - ids.shape[1] for step in steps]
    assert lengths == list(range(1, 33))
    published = golden["p1.stream_lengths"].tolist()
    assert lengths[: len(published)] == published
    assert [step[0, -1].item() for step in steps][: len(published)] == golden["p1.stream_last"].tolist()
    assert torch.equal(steps[-1][0, ids.shape[1] :], expected)


def test_beam_search(golden_model, fixture_dir):
    """Two beams give the published ids."""
    golden = tensors(fixture_dir, "generation.npz")
    out = golden_model.generate(
        golden["p2.input_ids"][None], max_new_tokens=10, num_beams=2, do_sample=False, early_stopping=False
    )
    assert torch.equal(out[0], golden["beam2.generated"])


def test_sampling_order(golden_model, fixture_dir):
    """Temperature, top-k 50 and top-p of the chat defaults filter as published."""
    golden = tensors(fixture_dir, "generation.npz")
    scores = golden["sampling.in"]
    top_p, temperature = golden["sampling.top_p"].item(), golden["sampling.temperature"].item()
    config, *_ = golden_model._merge_settings(do_sample=True, top_p=top_p, temperature=temperature)
    processors = golden_model._get_logits_processor(config, 1)
    assert [type(p) for p in processors] == [TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper]
    assert processors[1].top_k == golden["sampling.top_k_default"].item()
    for processor in processors:
        scores = processor(None, scores)
    finite = torch.isfinite(golden["sampling.out"])
    assert torch.equal(torch.isfinite(scores), finite)
    assert_close(scores[finite], golden["sampling.out"][finite], 1e-5)


def test_nan_logits_are_an_error(golden_model, tokenizer, fixture_dir):
    """The published code turned NaN into a fixed token without a word; here chat and streams stop and say so."""
    golden = tensors(fixture_dir, "generation.npz")
    assert not torch.isfinite(golden["sampling.invalid_in"]).all()
    next(golden_model.parameters()).data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN"):
        golden_model.chat(tokenizer, "你好", do_sample=False)
    with pytest.raises(FloatingPointError, match="NaN"):
        next(golden_model.stream_chat(tokenizer, "你好", do_sample=False))
    ids = golden_model.build_inputs(tokenizer, "你好")["input_ids"]
    with pytest.raises(FloatingPointError, match="NaN"):
        next(golden_model.stream_generate(ids, do_sample=True, max_new_tokens=4))


def test_ids_without_a_token_are_never_sampled(golden_model, tokenizer):
    """Ids of the padded vocabulary crashed published decoding; chat masks them and decode skips them."""
    lm_head = golden_model.get_output_embeddings()
    assert lm_head.weight.shape[0] > len(tokenizer)
    direction = golden_model.get_input_embeddings().weight[:50].sum(0)
    lm_head.weight.data[len(tokenizer) :] = 100 * direction.sign()
    lm_head.weight.data[len(tokenizer) + 1 :] *= -1
    response, _ = golden_model.chat(tokenizer, "你好", max_length=40, do_sample=False)
    *_, (streamed, _) = golden_model.stream_chat(tokenizer, "你好", max_length=40, do_sample=False)
    assert response == streamed
    ids = golden_model.generate(**golden_model.build_inputs(tokenizer, "你好"), max_new_tokens=4, do_sample=False)
    assert (ids >= len(tokenizer)).any()
    assert isinstance(tokenizer.decode(ids[0].tolist()), str)


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_chat_equals_golden(golden_model, tokenizer, fixture_dir, rounds, family_name):
    """Prompt, ids, answer, history and streamed answers equal the published chat."""
    golden = chat_golden(fixture_dir)
    case = next(case for case in golden["prompts"] if case["rounds"] == rounds)
    history = history_of(golden, rounds)
    assert tokenizer.build_prompt(case["query"], history) == case["prompt"]
    inputs = golden_model.build_inputs(tokenizer, case["query"], history)
    assert inputs["input_ids"].tolist() == case["encoded"]["input_ids"]
    max_length = case["gen_kwargs"]["max_length"]
    before = list(history)
    response, new_history = golden_model.chat(
        tokenizer, case["query"], history, max_length=max_length, do_sample=False
    )
    assert history == before
    assert response == case["greedy_response"]
    assert [list(turn) for turn in new_history] == case["new_history"]
    streamed = [
        text
        for text, _ in golden_model.stream_chat(
            tokenizer, case["query"], history, max_length=max_length, do_sample=False
        )
    ]
    published = case["stream_responses"]
    assert streamed[: len(published)] == published
    assert streamed[-1] == case["greedy_response"]
    if family_name == "chatglm-6b":  # the published stream lacks its last token
        assert len(streamed) == len(published) + 1


def test_chat_defaults(model_classes, fixture_dir):
    """Signatures and class attributes keep the published defaults: None in a signature is the attribute's value."""
    golden = chat_golden(fixture_dir)
    for method, defaults in (("chat", "chat_defaults"), ("stream_chat", "stream_chat_defaults")):
        parameters = inspect.signature(getattr(model_classes.model, method)).parameters
        for name, value in golden[defaults].items():
            default = parameters[name].default
            if name in ("max_length", "top_p", "temperature"):
                assert default is None
                default = getattr(model_classes.model, f"chat_{name}")
            assert default == value, (method, name)


def test_none_means_the_familys_default(golden_model, tokenizer, monkeypatch):
    """chat and stream_chat pass the class attributes on; given values stand above them."""
    seen = []

    def note(inputs=None, input_ids=None, custom_generate=None, **settings):
        seen.append({name: settings.get(name) for name in ("max_length", "top_p", "temperature")})
        ids = torch.nn.functional.pad(input_ids if inputs is None else inputs, (0, 1), value=5)
        return iter([(ids, None)]) if custom_generate else ids

    monkeypatch.setattr(golden_model, "generate", note)
    expected = {name: getattr(golden_model, f"chat_{name}") for name in ("max_length", "top_p", "temperature")}
    for given in ({}, {"top_p": None, "temperature": 0.5}, {"do_sample": False, "max_length": 90}):
        golden_model.chat(tokenizer, "你好", **given)
        list(golden_model.stream_chat(tokenizer, "你好", **given))
        wanted = expected | {name: value for name, value in given.items() if value is not None}
        if not wanted.pop("do_sample", True):
            wanted |= {"top_p": None, "temperature": None}
        assert seen == [wanted, wanted]
        seen.clear()


def test_process_response(golden_model, fixture_dir):
    """Answers are tidied as published."""
    for raw, tidy in chat_golden(fixture_dir)["process_response"]:
        assert golden_model.process_response(raw) == tidy


def test_cached_turns(golden_model, tokenizer, fixture_dir, family_name):
    """ChatGLM2's chat can go on behind the cache of the earlier turns, with the ids of the golden file."""
    if family_name != "chatglm2-6b":
        assert "past_key_values" not in inspect.signature(golden_model.stream_chat).parameters
        return
    expected = json.loads((fixture_dir / "kv_reuse_first_response.json").read_text("utf-8"))
    past_len = tensors(fixture_dir, "generation.npz")["kvreuse.past_len"].item()
    *_, (response, history, cache) = golden_model.stream_chat(
        tokenizer, "你好", max_length=40, do_sample=False, return_past_key_values=True
    )
    assert response in json.dumps(expected, ensure_ascii=False)
    assert cache.get_seq_length() == past_len
    cases = [case for case in chat_golden(fixture_dir)["prompts"] if "build_stream_inputs" in case]
    assert cases
    for case in cases:
        expected = case["build_stream_inputs"]
        num_past = len(expected["attention_mask"][0]) - len(expected["input_ids"][0])
        past = SimpleNamespace(get_seq_length=lambda num_past=num_past: num_past)
        turns = history_of(chat_golden(fixture_dir), case["rounds"])
        inputs = golden_model.build_stream_inputs(tokenizer, case["query"], turns, past)
        assert {name: value.tolist() for name, value in inputs.items()} == expected
    *_, (second, history, cache) = golden_model.stream_chat(
        tokenizer, "再写", history, cache, max_length=120, do_sample=False, return_past_key_values=True
    )
    assert len(history) == 2
    assert history[1] == ("再写", second)


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_a_question_that_quotes_the_template_reaches_the_cached_conversation_complete(golden_model, tokenizer):
    question, history = "看\n\n[Round 2]\n\n问：x\n\n答：y", [("你好", "你好！")]
    past = golden_model(torch.tensor([tokenizer.encode_prompt("你好")]), use_cache=True).past_key_values
    inputs = golden_model.build_stream_inputs(tokenizer, question, history, past)
    assert tokenizer.decode(inputs["input_ids"][0].tolist()) == f"\n\n[Round 2]\n\n问：{question}\n\n答："


def test_stream_errors(golden_model, tokenizer):
    """Settings that cannot be streamed and prompts without room say so."""
    for name, value in {"num_beams": 2, "num_return_sequences": 2, "stop_strings": ["好"], "max_time": 1}.items():
        with pytest.raises(ValueError, match=f"{name} cannot be streamed"):
            next(golden_model.stream_chat(tokenizer, "你好", **{name: value}))
    with pytest.raises(ValueError, match="max_new_tokens"):
        next(golden_model.stream_chat(tokenizer, "你好", max_new_tokens=0))
    with pytest.raises(ValueError, match="unknown generation settings"):
        next(golden_model.stream_chat(tokenizer, "你好", temprature=2))
    with pytest.raises(ValueError, match="max_length"):
        next(golden_model.stream_chat(tokenizer, "你好", max_length=3))


@pytest.mark.parametrize(
    "settings",
    [
        {"bad_words_ids": True},
        {"suppress_tokens": True},
        {"min_new_tokens": 9, "eos_token_id": True},
        {"min_length": 20, "eos_token_id": True},
        {"no_repeat_ngram_size": 1},
        {"repetition_penalty": 30.0},
        {"forced_eos_token_id": 7},
        {"exponential_decay_length_penalty": (3, 2.0), "eos_token_id": True},
        {"do_sample": True, "min_p": 0.999, "top_k": 0},
        {"do_sample": True, "typical_p": 0.2},
        {"do_sample": True, "temperature": 2.0, "top_k": 0, "top_p": 0.5},
    ],
    ids=str,
)
def test_streams_honour_what_generate_does(golden_model, fixture_dir, settings):
    """A left-padded batch and one prompt: ids under a setting are those of generate, given or in the model's own."""
    golden, batch = tensors(fixture_dir, "generation.npz"), tensors(fixture_dir, "batch_left_padded.npz")
    usual = golden["p1.generated_cache"][2].item()  # a token that the setting rules out, or ends with
    forms = {"bad_words_ids": [[usual]], "suppress_tokens": [usual], "eos_token_id": usual}
    settings = {name: forms[name] if value is True and name in forms else value for name, value in settings.items()}
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": [], "pad_token_id": 0, **settings}
    has_effect = []
    for inputs in (
        {"input_ids": golden["p1.input_ids"][None]},
        {name: batch[name] for name in ("input_ids", "attention_mask")},
    ):
        torch.manual_seed(0)
        expected = golden_model.generate(**inputs, **{**settings, "eos_token_id": settings["eos_token_id"] or None})
        for given in (settings, {"generation_config": GenerationConfig(**settings)}):
            torch.manual_seed(0)
            *_, last = golden_model.stream_generate(**inputs, **given)
            assert torch.equal(last, expected)
        plain = golden_model.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=None)
        has_effect.append(not torch.equal(plain, expected))
    assert any(has_effect) or settings["do_sample"]


def test_a_given_config_leaves_the_models_own_end_token(golden_model, fixture_dir):
    """As in generate: what a GenerationConfig leaves open is the model's."""
    golden = tensors(fixture_dir, "generation.npz")
    ids = golden["p1.input_ids"][None]
    golden_model.generation_config.eos_token_id = golden["stop.eos_token_id"].item()
    *_, last = golden_model.stream_generate(ids, generation_config=GenerationConfig(max_new_tokens=32))
    assert torch.equal(last[0, ids.shape[1] :], golden["stop.generate"])


def test_first_token_ends_it(golden_model, fixture_dir):
    """An end token that comes first, and a limit of one token, end a stream after one step."""
    golden = tensors(fixture_dir, "generation.npz")
    ids, first = golden["p1.input_ids"][None], golden["p1.generated_cache"][0].item()
    for settings in ({"max_new_tokens": 8, "eos_token_id": [0, first]}, {"max_new_tokens": 1}):
        steps = list(golden_model.stream_generate(ids, do_sample=False, **settings))
        assert [step[0, ids.shape[1] :].tolist() for step in steps] == [[first]]


def test_chat_honours_what_generate_does(golden_model, tokenizer):
    """Tokens that a setting rules out are no invalid logits; several sequences and stop strings go to generate."""
    settings = {"do_sample": False, "max_length": 40}
    plain, _ = golden_model.chat(tokenizer, "你好", **settings)
    ids = tokenizer.encode_text(plain)
    for banned in ({"suppress_tokens": ids}, {"bad_words_ids": [[token] for token in ids]}):
        answer, _ = golden_model.chat(tokenizer, "你好", **settings, **banned)
        *_, (streamed, _) = golden_model.stream_chat(tokenizer, "你好", **settings, **banned)
        assert answer == streamed != plain
    answers = [golden_model.chat(tokenizer, "你好", max_length=40, temperature=value, top_p=0) for value in (2, 2.0)]
    assert answers[0] == answers[1]
    for banned in ({"suppress_tokens": ids}, {"bad_words_ids": [[token] for token in ids]}):
        assert golden_model.chat(tokenizer, "你好", num_beams=2, **settings, **banned)[0] != plain
    stopped, _ = golden_model.chat(tokenizer, "你好", stop_strings=[plain[1]], **settings)
    assert len(stopped) < len(plain)
    with pytest.raises(ValueError, match="temprature"):
        golden_model.chat(tokenizer, "你好", temprature=2)


def test_control_strings_in_a_query_stay_text(golden_model, tokenizer):
    """A user cannot end the prompt or add a turn marker with typed control strings."""
    config = golden_model.config
    special = [config.eos_token_id, config.pad_token_id, getattr(config, "bos_token_id", None)]
    ids = golden_model.build_inputs(tokenizer, "</s><eop><sop>[gMASK]eop<pad>")["input_ids"][0].tolist()
    assert ids == tokenizer.encode_prompt("</s><eop><sop>[gMASK]eop<pad>")
    plain = golden_model.build_inputs(tokenizer, "你好")["input_ids"][0].tolist()
    for token in special:
        assert token is None or ids.count(token) == plain.count(token)


def test_positions_and_masks_of_odd_sequences(model_classes, fixture_dir, golden_model, family_name):
    """MASK, gMASK, both, two bos: positions equal the golden cases; a sequence without bos is refused."""
    if family_name != "chatglm-6b":
        assert not (fixture_dir / "mask_position_cases.json").exists()
        return
    cases = json.loads((fixture_dir / "mask_position_cases.json").read_text())
    assert len(cases) >= 4
    for case in cases:
        ids = torch.tensor([case["input_ids"]]).reshape(1, -1)
        positions = golden_model.transformer.get_position_ids(ids)
        assert positions[0].tolist() == np.array(case["model_position_ids"]).reshape(2, -1).tolist()
        keep, _ = golden_model.transformer._keep_mask(None, positions, ids.shape[1], None)
        blocked = np.array(case["model_attention_mask"]).reshape(ids.shape[1], -1).astype(bool)
        assert np.array_equal(~keep[0, 0].numpy(), blocked)
    with pytest.raises(ValueError, match="bos"):
        golden_model(torch.tensor([[5, 6, 7]]))
