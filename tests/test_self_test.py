"""make self-test: every part runs on a tiny model, and the report says what is not as expected."""

import json
import random

import pytest
import torch

from glm_utils.cli import UserError
from tests.conftest import FIXTURES_DIR, PROJECT_DIR, write_quantized
from tools import self_test


@pytest.mark.slow
def test_self_test_runs_on_a_tiny_model(tmp_path):
    self_test.self_test(
        model_path=str(PROJECT_DIR / "models/chatglm2-tiny"),
        output_dir=str(tmp_path / "report"),
        num_steps=2,
        max_new_tokens=6,
        device="cpu",
    )
    report = json.loads((tmp_path / "report/report.json").read_text("utf-8"))
    assert len(report["training"]["losses"]) == 2
    assert set(report["answers"]) == {"as it is", "int4"}
    assert 0 < report["int4"]["same_top_1"] <= 1
    assert report["int4"]["kl"] > 0
    text = (tmp_path / "report/report.md").read_text("utf-8")
    assert text.count("| ") >= 5
    assert "大众汽车" in text


def test_findings_name_what_is_wrong():
    answer = {"text": "好", "num_tokens": 2, "ended": True}
    good = {
        "perplexity": {"in_order": 8.0, "shuffled": 900.0, "share_lower_in_order": 1.0},
        "int4": {"kl": 0.02, "same_top_1": 0.95, "num_tokens": 500},
        "answers": {"as it is": [answer] * 3, "int4": [answer] * 3},
        "training": {"losses": [3.0, 2.5, 2.0, 1.5]},
    }
    assert all(is_expected for _, _, is_expected in self_test.findings(good))
    bad = {
        "perplexity": {"in_order": 900.0, "shuffled": 900.0, "share_lower_in_order": 0.5},
        "int4": {"kl": 2.0, "same_top_1": 0.3, "num_tokens": 500},
        "answers": {"as it is": [answer] * 3, "int4": [{**answer, "ended": False}] * 3},
        "training": {"losses": [3.0, 3.0, 3.5, 4.0]},
    }
    assert not any(is_expected for _, _, is_expected in self_test.findings(bad))


def test_same_logits_have_no_divergence():
    scores = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    assert self_test.compare_log_probs([scores], [scores]) == {"kl": 0, "same_top_1": 1, "num_tokens": 5}
    other = torch.roll(scores, 1, dims=-1)
    found = self_test.compare_log_probs([scores], [other])
    expected = (scores.exp() * (scores - other)).sum(-1).mean().item()
    assert found["kl"] == pytest.approx(expected)
    assert found["same_top_1"] == 0


def test_shuffling_keeps_the_parts():
    rng = random.Random(0)
    assert sorted(self_test.shuffle_text("今天天气很好", rng)) == sorted("今天天气很好")
    assert sorted(self_test.shuffle_text("the day is fine", rng).split()) == ["day", "fine", "is", "the"]


def test_quantized_model_is_refused(tmp_path):
    model_dir = FIXTURES_DIR / "chatglm2-6b" / "model"
    quantized = write_quantized(model_dir, tmp_path / "quantized")
    with pytest.raises(UserError, match="the self test quantizes it itself"):
        self_test.self_test(model_path=str(quantized), output_dir=str(tmp_path / "report"))
