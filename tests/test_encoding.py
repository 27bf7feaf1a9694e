"""From examples to batches: prompts, truncation, labels, padding, and the sample that is shown."""

import numpy as np
import pytest
import torch

from glm_utils.cli import UserError
from glm_utils.collators import Collator
from glm_utils.data import Example
from glm_utils.encoding import (
    IGNORED_LABEL,
    EncodingLimits,
    encode_examples,
    show_example,
    truncate_answer,
    truncate_prompt,
)

WIDE = EncodingLimits(512, 512)
QUERY, ANSWER = "类型#上衣*材质#牛仔布*颜色#白色", "白色的牛仔上衣，百搭又时尚。"
HISTORY = (("你好，白色上衣", "你好！"), ("颜色", "白色。"))


def example(query=QUERY, answer=ANSWER, history=()):
    return Example(query, answer, history, "data.jsonl:1")


def test_prompt_is_the_one_chat_builds(tokenizer):
    ids, truncated = truncate_prompt(example(history=HISTORY), tokenizer, WIDE)
    assert ids == tokenizer(tokenizer.build_prompt(QUERY, list(HISTORY)))["input_ids"]
    assert truncated is False


def test_labels_are_the_answer_and_the_end_token_only(tokenizer):
    encoded = encode_examples([example()], tokenizer, WIDE)
    sample = encoded.dataset[0]
    answer_ids = tokenizer.encode_text(ANSWER) + [tokenizer.eos_token_id]
    num_prompt = len(tokenizer.encode_prompt(QUERY))
    assert sample["input_ids"][num_prompt:] == answer_ids
    assert sample["labels"] == [IGNORED_LABEL] * num_prompt + answer_ids


def test_golden_layout_of_a_training_example(tokenizer, fixture_dir, monkeypatch):
    golden = np.load(fixture_dir / "train_single.npz")
    ids, labels = golden["input_ids"][0].tolist(), golden["labels"][0].tolist()
    num_prompt = labels.count(IGNORED_LABEL)
    special = {tokenizer.convert_tokens_to_ids(token) for token in ("[gMASK]", "sop", "<sop>")}
    query = tokenizer.decode([index for index in ids[:num_prompt] if index not in special])
    answer = tokenizer.decode(ids[num_prompt:-1])
    monkeypatch.setattr(tokenizer, "build_prompt", lambda query, history=None: query)  # the golden one has no template
    sample = encode_examples([example(query, answer)], tokenizer, WIDE).dataset[0]
    assert sample["input_ids"] == ids
    assert sample["labels"] == labels


def test_prompt_text_leads_every_question_and_is_never_truncated(tokenizer):
    history = [("写文案：" + question, answer) for question, answer in HISTORY]
    expected = tokenizer.encode_prompt("写文案：" + QUERY, history)
    tokenizer.prompt_text = "写文案："
    assert truncate_prompt(example(history=HISTORY), tokenizer, WIDE) == (expected, False)
    shortest = tokenizer.encode_prompt(QUERY[:3])
    ids, truncated = truncate_prompt(example(history=HISTORY), tokenizer, EncodingLimits(len(shortest), 512))
    assert truncated
    assert ids[: len(shortest)] == shortest  # the question is truncated, not prompt_text
    num_least = len(tokenizer.encode_prompt(""))
    with pytest.raises(UserError, match=f"template with prompt_text takes {num_least} tokens, --max_input_length"):
        truncate_prompt(example(), tokenizer, EncodingLimits(num_least - 1, 512))


@pytest.mark.parametrize("text", ["[gMASK]", "<sop>", "sop", "</s>", "<eop>", "[MASK]", "<n>", "<|blank_4|>", "<pad>"])
def test_control_tokens_typed_by_a_user_stay_text(tokenizer, text):
    encoded = encode_examples([example(f"a {text} b", f"c {text} d")], tokenizer, WIDE).dataset[0]
    plain = encode_examples([example("a b", "c d")], tokenizer, WIDE).dataset[0]
    control = {tokenizer.convert_tokens_to_ids(token) for token in ("[gMASK]", "[MASK]", "[sMASK]", "sop", "<sop>")}
    control |= {tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    count = sum(index in control for index in encoded["input_ids"])
    assert count == sum(index in control for index in plain["input_ids"])
    assert encoded["labels"][-1] == tokenizer.eos_token_id
    assert encoded["labels"].count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("max_output_length", [2, 3, 8])
def test_a_truncated_answer_keeps_its_end_token(tokenizer, max_output_length):
    complete = tokenizer.encode_answer(ANSWER)
    ids, truncated = truncate_answer(example(), tokenizer, EncodingLimits(512, max_output_length))
    assert truncated is True
    assert ids == [*complete[: max_output_length - 1], tokenizer.eos_token_id]


def test_an_answer_that_just_fits_is_not_truncated(tokenizer):
    complete = tokenizer.encode_answer(ANSWER)
    assert truncate_answer(example(), tokenizer, EncodingLimits(512, len(complete))) == (complete, False)


def test_a_truncated_prompt_loses_old_turns_first(tokenizer):
    without_oldest = tokenizer.encode_prompt(QUERY, list(HISTORY[1:]))
    ids, truncated = truncate_prompt(example(history=HISTORY), tokenizer, EncodingLimits(len(without_oldest), 512))
    assert (ids, truncated) == (without_oldest, True)


def test_a_truncated_question_loses_its_end_and_keeps_the_template(tokenizer):
    complete = tokenizer.encode_prompt(QUERY)
    for max_input_length in range(len(tokenizer.encode_prompt("类")), len(complete)):
        ids, truncated = truncate_prompt(example(history=HISTORY), tokenizer, EncodingLimits(max_input_length, 512))
        candidates = [tokenizer.encode_prompt(QUERY[:number]) for number in range(len(QUERY) + 1)]
        assert truncated is True
        assert len(ids) <= max_input_length
        assert ids in candidates
        assert len(ids) >= max_input_length - 3  # nothing is thrown away without need


def test_a_limit_below_the_template_is_refused(tokenizer):
    if len(tokenizer.encode_prompt("")) > 4:
        with pytest.raises(UserError, match=r"data.jsonl:1: the prompt's template alone takes \d+ tokens"):
            truncate_prompt(example(), tokenizer, EncodingLimits(4, 512))
    with pytest.raises(UserError, match="--max_input_length=1"):
        EncodingLimits(1, 512)
    with pytest.raises(UserError, match="--max_output_length=0"):
        EncodingLimits(512, 0)


def test_an_example_beyond_the_context_length_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"data.jsonl:1: \d+ tokens, the model takes 20. Lower --max_input_length"):
        encode_examples([example()], tokenizer, WIDE, max_length=20)


def test_counts(tokenizer):
    examples = [example(), example(answer=ANSWER * 3)]
    limit = len(tokenizer.encode_answer(ANSWER))
    encoded = encode_examples(examples, tokenizer, EncodingLimits(512, limit))
    num_prompt = len(tokenizer.encode_prompt(QUERY))
    assert encoded.counts == {
        "num_rows": 2,
        "num_tokens": 2 * (num_prompt + limit),
        "num_trained_tokens": 2 * limit,
        "longest": num_prompt + limit,
        "num_cut_prompts": 0,
        "num_cut_answers": 1,
        "num_dropped": 0,
    }
    assert (list(encoded.truncated_prompts), list(encoded.truncated_answers), list(encoded.dropped)) == ([], [1], [])
    assert encoded.lengths.tolist() == [num_prompt + limit] * 2


def test_a_cut_answer_trains_no_end_token(tokenizer):
    complete = tokenizer.encode_answer(ANSWER)
    for limit in (2, len(complete) - 1):
        encoded = encode_examples([example()], tokenizer, EncodingLimits(512, limit, "cut"))
        sample = encoded.dataset[0]
        assert sample["input_ids"] == tokenizer.encode_prompt(QUERY) + complete[:limit]
        assert [label for label in sample["labels"] if label != IGNORED_LABEL] == complete[:limit]
        assert tokenizer.eos_token_id not in sample["labels"]
        assert list(encoded.truncated_answers) == [0]
    whole = encode_examples([example()], tokenizer, EncodingLimits(512, len(complete), "cut")).dataset[0]
    assert whole["labels"][-1] == tokenizer.eos_token_id


def test_examples_with_long_answers_are_left_out(tokenizer):
    """Also one that would be refused, and one whose prompt is truncated too: what is not there has no faults."""
    limit = len(tokenizer.encode_answer(ANSWER))
    rows = [example(answer=ANSWER * 3), example(), example(QUERY * 9, ANSWER * 2), example(QUERY * 2)]
    num_prompt = len(tokenizer.encode_prompt(QUERY))
    encoded = encode_examples(rows, tokenizer, EncodingLimits(num_prompt, limit, "drop"), num_prompt + limit)
    kept = encode_examples([rows[1], rows[3]], tokenizer, EncodingLimits(num_prompt, limit))
    assert list(encoded.dataset) == list(kept.dataset)
    assert encoded.counts == {**kept.counts, "num_dropped": 2}
    assert (list(encoded.truncated_prompts), list(encoded.truncated_answers), list(encoded.dropped)) == (
        [3],
        [],
        [0, 2],
    )
    with pytest.raises(UserError, match=r"^all answers, 1 from data.jsonl:1 on, are longer .* drop leaves them out"):
        encode_examples(rows[:1], tokenizer, EncodingLimits(512, limit, "drop"))


@pytest.mark.parametrize("side", ["right", "left"])
def test_collator(side):
    features = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = Collator(pad_token_id=3, padding_side=side)(features)
    right = side == "right"
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 3, 3] if right else [3, 3, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0] if right else [0, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100] if right else [-100, -100, 8]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def golden_features(golden, mask_side):
    labels = golden[f"{mask_side}_labels"]
    lengths = [
        labels.shape[1] - (np.flatnonzero(line[::-1] != -100)[0] if mask_side == "right" else 0) for line in labels
    ]
    return [
        {"input_ids": ids[:length].tolist(), "labels": line[:length].tolist()}
        for ids, line, length in zip(golden[f"{mask_side}_input_ids"], labels, lengths, strict=True)
    ]


def test_a_padded_batch_has_the_golden_loss(golden_model, tokenizer, family, fixture_dir):
    golden = np.load(fixture_dir / "train_batch.npz")
    features = golden_features(golden, "right")
    assert len(features[0]["input_ids"]) != len(features[1]["input_ids"])
    for side in ("right", "left"):
        batch = Collator(tokenizer.pad_token_id, side)(features)
        if side == "right":
            assert batch["input_ids"].tolist() == golden["right_input_ids"].tolist()
        with torch.no_grad():
            loss = golden_model(**batch).loss
        assert abs(loss.item() - golden["right_loss"].item()) < 1e-4
    assert family.padding_side == "right"


def test_sample_shows_the_trained_part(tokenizer):
    sample = encode_examples([example()], tokenizer, WIDE).dataset[0]
    shown = show_example(sample, tokenizer)
    prompt, trained = shown.split(" [[ ")
    assert "牛仔" in trained
    assert trained.endswith(f"{tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id)} ]]")
    assert "[gMASK]" in prompt
    assert "上衣" in prompt
