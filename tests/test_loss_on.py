"""--loss_on all: one example per answered turn, which trains as the same examples made by hand, packed and padded."""

import json

import pytest

import train_qlora as stage
from glm_utils.checkpoint import open_checkpoint
from glm_utils.cli import UserError
from glm_utils.collators import Collator, PackingCollator
from glm_utils.data import Example
from glm_utils.data.turns import AnsweredTurns
from glm_utils.encoding import encode_examples
from glm_utils.evaluation import at_end
from glm_utils.family import PROJECT_DIR
from glm_utils.limits import EncodingLimits
from glm_utils.load_model import load_base_model

ALONE = Example("颜色？", "白色。", (), "b.jsonl:1")
TALK = Example("多少钱？", "九十九元。", (("你好", "你好！"), ("在吗", " \n"), ("有裙子吗", "有的。")), "a.jsonl:7")
BY_HAND = [
    Example("你好", "你好！", (), "a.jsonl:7, turn 1"),
    Example("有裙子吗", "有的。", TALK.history[:2], "a.jsonl:7, turn 3"),
    Example("多少钱？", "九十九元。", TALK.history, "a.jsonl:7, turn 4"),
    ALONE,
]
LIMITS = EncodingLimits(512, 512)


def test_every_answered_turn_is_an_example():
    turns = AnsweredTurns([TALK, ALONE])
    assert list(turns) == BY_HAND
    assert (len(turns), turns[1], turns[-1], turns[1:3]) == (4, BY_HAND[1], ALONE, BY_HAND[1:3])
    with pytest.raises(IndexError):
        turns[4]
    unanswered = Example("谁？", "", TALK.history, "a.jsonl:8")
    assert list(AnsweredTurns([unanswered])) == [
        Example("你好", "你好！", (), "a.jsonl:8, turn 1"),
        Example("有裙子吗", "有的。", TALK.history[:2], "a.jsonl:8, turn 3"),
    ]


def test_examples_are_made_when_they_are_asked_for():
    """A sequence that reads a file on access is neither copied nor kept."""

    class Counted(list):
        asked = 0

        def __getitem__(self, index):
            self.asked += 1
            return super().__getitem__(index)

    source = Counted([TALK] * 50)
    turns = AnsweredTurns(source)
    assert len(turns) == 150
    source.asked = 0
    assert turns[149].where == "a.jsonl:7, turn 4"
    assert source.asked == 1


@pytest.fixture(scope="module", params=["chatglm-tiny", "chatglm2-tiny"])
def base(request):
    checkpoint = open_checkpoint(PROJECT_DIR / "models" / request.param)
    return checkpoint, load_base_model(checkpoint)


def trained(model, batch):
    """Return the summed loss of a batch and its gradients."""
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=1).loss
    loss.backward()
    return loss.item(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


def test_packed_and_padded_gradients_are_the_sum_of_the_turns(base):
    checkpoint, model = base
    tokenizer = checkpoint.tokenizer
    rows = list(encode_examples(AnsweredTurns([TALK, ALONE]), tokenizer, LIMITS).dataset)
    by_hand = [
        trained(model, PackingCollator()(encode_examples([each], tokenizer, LIMITS).dataset)) for each in BY_HAND
    ]
    loss = sum(loss for loss, _ in by_hand)
    expected = {name: sum(gradients[name] for _, gradients in by_hand) for name in by_hand[0][1]}
    last_only = trained(model, PackingCollator()(list(encode_examples([TALK, ALONE], tokenizer, LIMITS).dataset)))
    assert last_only[0] < 0.9 * loss
    for collate in (PackingCollator(), Collator(tokenizer.pad_token_id, checkpoint.family.padding_side)):
        found_loss, found = trained(model, collate(rows))
        assert found_loss == pytest.approx(loss, rel=1e-5)
        for name, gradient in expected.items():
            scale = gradient.abs().max().clamp(min=1e-6)
            assert (found[name] - gradient).abs().max() / scale < 1e-4, name


@pytest.mark.parametrize("truncated_answers", ["cut_and_end", "cut", "drop"])
def test_limits_hold_for_each_turn(base, truncated_answers):
    """An inner answer that is too long is treated as a last one, and named with its turn."""
    tokenizer = base[0].tokenizer
    limit = len(tokenizer.encode_answer("有的。"))
    encoded = encode_examples(AnsweredTurns([TALK]), tokenizer, EncodingLimits(512, limit, truncated_answers))
    places = encoded.dropped if truncated_answers == "drop" else encoded.truncated_answers
    assert [AnsweredTurns([TALK])[place].where for place in places] == ["a.jsonl:7, turn 4"]
    assert len(encoded.dataset) == (2 if truncated_answers == "drop" else 3)


def test_template_faults_name_the_turn(base):
    checkpoint, _ = base
    with pytest.raises(UserError, match=r"a.jsonl:7, turn 1: \d+ tokens, the model takes 5"):
        encode_examples(AnsweredTurns([TALK]), checkpoint.tokenizer, LIMITS, max_length=5)


def test_all_answers_are_trained_and_measured(base, write, tmp_path, monkeypatch):
    """In a run: the counts, the record, a loss; --evaluate_after gets the conversations as they are."""
    judged = []
    monkeypatch.setattr(at_end, "check_evaluation", lambda output_dir: None)
    monkeypatch.setattr(at_end, "evaluate_output", lambda *args, **kwargs: judged.extend(args[3]))
    monkeypatch.chdir(tmp_path)
    row = {"query": TALK.query, "response": TALK.answer, "history": TALK.history}
    data = write("talk.jsonl", json.dumps(row, ensure_ascii=False) + "\n")
    args = {"output_dir": "out", "max_steps": 1, "per_device_train_batch_size": 4, "report_to": "none"}
    args |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    flags = {"model_name_or_path": str(base[0].directory), "train_args_json": str(write("args.json", args))}
    stage.train_qlora(**flags, train_data_path=str(data), eval_data_path=str(data), loss_on="all", evaluate_after=True)
    assert [(each.query, each.history) for each in judged] == [(TALK.query, TALK.history)]
    record = json.loads((tmp_path / "out/run_config.json").read_text("utf-8"))
    by_hand = encode_examples(BY_HAND[:3], base[0].tokenizer, LIMITS).counts
    for part in ("train", "eval"):
        assert record["data"][part] == {**by_hand, "num_duplicates": 0}
    assert record["identity"]["loss_on"] == "all"
    assert 0 < json.loads((tmp_path / "out/eval_results.json").read_text())["eval_loss"] < 20
