"""What a run leaves to look at: loss curves beside its results, sample answers in TensorBoard."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from torch import nn

import train_qlora as stage
from glm_utils.training import curves, sample_answers
from glm_utils.training.curves import finite_points, smoothed, write_curves
from glm_utils.training.sample_answers import SampleAnswers, as_markdown

EXAMPLES = [{"content": f"类型#裙*颜色#{color}色", "summary": f"{color}色的裙子。"} for color in "白黑红蓝绿"]
HISTORY = [
    {"eval_loss": 4.0, "step": 0},
    *({"loss": 3.0 - step / 10, "step": step} for step in range(1, 11)),
    {"loss": float("nan"), "step": 11},
    {"eval_loss": 2.0, "step": 11},
    {"train_loss": 2.5, "step": 11},
]


@pytest.fixture
def train(write, model_dir, tmp_path, monkeypatch):
    """Train four steps with an evaluation every two; returns the output directory."""
    monkeypatch.setattr(sample_answers, "MAX_ANSWER_TOKENS", 8)
    data = "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in EXAMPLES)

    def run(name, args=None, **flags):
        values = {"output_dir": str(tmp_path / name), "max_steps": 4, "logging_steps": 1, "save_steps": 2}
        values |= {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "disable_tqdm": True}
        values |= {"per_device_train_batch_size": 2, "report_to": "tensorboard", **(args or {})}
        path = str(write("data.jsonl", data))
        stage.train_qlora(
            train_args_json=str(write("args.json", values)),
            model_name_or_path=str(model_dir),
            train_data_path=path,
            eval_data_path=path,
            **flags,
        )
        return tmp_path / name

    return run


def size_of(path):
    """Return width and height of a PNG file."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def sample_texts(out):
    """Return the logged sample answers as {number: {step: text}}."""
    events = EventAccumulator(str(next(out.glob("runs/*"))), size_guidance={"tensors": 0}).Reload()
    tags = [tag for tag in events.Tags()["tensors"] if tag.startswith("sample answers/")]
    return {
        tag.split("/")[1]: {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)}
        for tag in tags
    }


# ---- curves


def test_curves_are_drawn(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(curves, "draw_curve", lambda path, points: drawn.update({path.name: points}) or path.touch())
    write_curves(tmp_path, HISTORY)
    assert drawn["eval_loss.png"] == [(0, 4.0), (11, 2.0)]
    assert [step for step, _ in drawn["training_loss.png"]] == list(range(1, 11))  # without the NaN
    monkeypatch.undo()
    write_curves(tmp_path, HISTORY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval_loss.png", "training_loss.png"]
    assert size_of(tmp_path / "training_loss.png") == size_of(tmp_path / "eval_loss.png") == (960, 540)


def test_a_step_that_was_done_again_counts_once():
    history = [{"loss": 3.0, "step": 1}, {"loss": 2.0, "step": 2}, {"loss": 1.0, "step": 1}]
    assert finite_points(history, "loss") == [(1, 1.0), (2, 2.0)]


def test_the_smoothed_curve_follows_the_raw_one():
    values = [3.0 + (-1) ** step for step in range(200)]
    averages = smoothed(values)
    assert len(averages) == 200
    assert averages[0] == values[0]
    assert np.std(averages[100:]) < 0.1 * np.std(values)
    assert np.mean(averages) == pytest.approx(3.0, abs=0.1)
    assert smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0] * 3)
    assert smoothed([1.0, 5.0]) == [1.0, 5.0]  # too few to average


def test_without_values_nothing_is_drawn(tmp_path):
    write_curves(tmp_path, [{"train_loss": 1.0, "step": 1}])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_without_matplotlib_one_line_says_how_to_install_it(train, monkeypatch, log_lines):
    monkeypatch.setattr(curves, "find_spec", lambda name: None)
    out = train("out")
    assert not list(out.glob("*.png"))
    (line,) = [line for line in log_lines if "is not installed" in line]
    assert line.endswith("matplotlib is not installed. Run pip install -e '.[eval]' -c constraints.txt")


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_a_resumed_run_draws_one_curve(train, monkeypatch):
    drawn = {}
    real = curves.draw_curve
    monkeypatch.setattr(
        curves, "draw_curve", lambda path, points: drawn.update({path.name: points}) or real(path, points)
    )
    complete = train("complete")
    whole = dict(drawn)
    assert [step for step, _ in whole["training_loss.png"]] == [1, 2, 3, 4]
    assert [step for step, _ in whole["eval_loss.png"]] == [0, 2, 4]
    shutil.copytree(complete / "checkpoint-2", complete.parent / "resumed" / "checkpoint-2")
    resumed = train("resumed", resume_from_checkpoint="latest")
    assert drawn == whole
    assert size_of(resumed / "training_loss.png")


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_an_earlier_run_leaves_no_curve_behind(train):
    train("out")
    out = train("out", {"overwrite_output_dir": True, "logging_strategy": "no"})
    assert [path.name for path in out.glob("*.png")] == ["eval_loss.png"]


# ---- sample answers


@pytest.mark.parametrize("more", [{}, {"activation_checkpointing": True}, {"packing": False}], ids=str)
def test_sample_answers_are_logged_and_change_nothing(train, more):
    flags = {"packing": more.get("packing", True)}
    args = {key: value for key, value in more.items() if key != "packing"}
    with_samples, without = train("with", args, log_samples=2, **flags), train("without", args, **flags)
    texts = sample_texts(with_samples)
    assert not sample_texts(without)
    assert {number: sorted(steps) for number, steps in texts.items()} == {"1": [0, 2, 4], "2": [0, 2, 4]}
    for number, color in (("1", "白"), ("2", "黑")):
        for text in texts[number].values():
            prompt, expected, generated = text.split("\n\n**")
            assert prompt.startswith("**prompt**\n\n")
            assert f"类型\\#裙\\*颜色\\#{color}色" in prompt
            assert expected == f"expected**\n\n{color}色的裙子。"
            assert generated.startswith("generated**\n\n")
    adapters = [(out / "adapter_model.safetensors").read_bytes() for out in (with_samples, without)]
    assert adapters[0] == adapters[1]


def test_generating_leaves_the_random_state_and_the_mode(train, monkeypatch):
    real, seen = SampleAnswers.on_evaluate, []

    def on_evaluate(self, args, state, control, **kwargs):
        model = self.trainer.model
        model.train()
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        real(self, args, state, control, **kwargs)
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
        assert all(module.training for module in model.modules() if isinstance(module, nn.Dropout))
        seen.append(state.global_step)

    monkeypatch.setattr(SampleAnswers, "on_evaluate", on_evaluate)
    train("out", log_samples=1, lora_dropout=0.1)
    assert seen == [0, 2, 4]


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_more_samples_than_examples_are_all_examples_and_a_last_evaluation_counts(train):
    out = train("out", {"eval_strategy": "no", "eval_on_start": False, "max_steps": 1}, log_samples=99)
    (texts,) = [{number: list(steps) for number, steps in sample_texts(out).items()}]
    assert texts == {str(number): [1] for number in range(1, 6)}


@pytest.mark.parametrize(
    "text",
    ["类型#裙*颜色#白*", "<b>x</b> & <script>alert(1)</script>", "# a\n- b\n1. c", "[x](javascript:a)", "_a_ `b`"],
)
def test_texts_are_shown_as_they_are(text):
    shown = markdown_to_safe_html(as_markdown(text))
    inside = shown.partition("<p>")[2].rpartition("</p>")[0]
    assert "<b>" not in inside
    assert "<script" not in inside
    assert "<a" not in inside
    visible = inside.replace("<br>", "").replace("<br />", "").replace("&lt;", "<").replace("&gt;", ">")
    assert visible.replace("&amp;", "&") == text


def test_control_characters_and_empty_answers_are_shown_harmlessly():
    assert as_markdown("a\x1b]0;x\x07b") == "a \\]0;x b"
    assert as_markdown("") == as_markdown(" \n") == "(empty)"
