"""--early_stopping_patience and the best step: what is kept, where a run stops, also one that was killed before."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from glm_utils.cli import UserError
from glm_utils.training import run as training_run
from glm_utils.training.best_step import waited_since_best
from glm_utils.training.trainer import LoraTrainer
from tests.test_checkpoints import make_flags, run
from tests.test_train import run_two_processes

# eval_loss falls and rises: the learning rate is too high. Checkpoints are rarer than evaluations
ARGS = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 3, "max_steps": 12, "save_total_limit": 1}
ARGS |= {"learning_rate": 0.3, "lr_scheduler_type": "constant"}
FLAGS = {"early_stopping_patience": 3}
BEST, LAST = 4, 7  # of ARGS and FLAGS


def stop_early(directory, name="out", args=None, **flags):
    return run(directory, directory / name, {**ARGS, **(args or {})}, **{**FLAGS, **flags})


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that stopped early, uninterrupted."""
    return stop_early(tmp_path_factory.mktemp("stopped"))


def read_json(path):
    return json.loads(path.read_text("utf-8"))


def eval_losses(out):
    history = read_json(out / "trainer_state.json")["log_history"]
    return {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}


def assert_same_bits(first, second):
    first, second = (load_file(path / "adapter_model.safetensors") for path in (first, second))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def check_kept(out, best, last):
    """The run ended at `last`, and everything that it left tells of `best`."""
    losses, results = eval_losses(out), read_json(out / "all_results.json")
    assert max(losses) == read_json(out / "trainer_state.json")["global_step"] == last
    assert min(losses, key=losses.get) == best
    assert_same_bits(out, out / f"checkpoint-{best}")
    assert (results["kept_step"], results["last_step"], results["eval_loss"]) == (best, last, losses[best])
    assert read_json(out / "run_config.json")["kept_step"] == best
    card = (out / "README.md").read_text("utf-8")
    assert f"The weights are those of step {best} of {last}, where eval_loss was lowest." in card
    assert f"eval_loss | {losses[best]:.4f}" in card


def test_a_run_stops_and_keeps_its_best_step(stopped):
    """Step 4 is no multiple of save_steps: it has a checkpoint because it is the best one."""
    check_kept(stopped, BEST, LAST)
    assert sorted(path.name for path in stopped.glob("checkpoint-*")) == [f"checkpoint-{BEST}", f"checkpoint-{LAST}"]
    assert read_json(stopped / "run_config.json")["training_args"]["load_best_model_at_end"] is True


def test_padded_batches_stop_as_well(tmp_path, log_lines):
    out = stop_early(tmp_path, early_stopping_patience=2, packing=False)
    check_kept(out, 2, 4)
    assert any("stopping at step 4: 2 evaluations no better than step 2" in line for line in log_lines)
    (line,) = [line for line in log_lines if "adapter written to" in line]
    assert f"eval_loss {eval_losses(out)[2]:.4f}, of the best step, 2" in line


def test_a_file_may_refuse_the_best_step(tmp_path):
    out = stop_early(tmp_path, args={"load_best_model_at_end": False})
    assert_same_bits(out, out / f"checkpoint-{LAST}")
    results = read_json(out / "all_results.json")
    assert (results["kept_step"], results["last_step"]) == (LAST, LAST)
    assert f"step {LAST} of {LAST}." in (out / "README.md").read_text("utf-8")


def dying_step(step):
    """Return a training step that kills the run when it is due."""
    inner = LoraTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return inner(self, *args, **kwargs)

    return training_step


@pytest.mark.parametrize("death", [1, 3, 5, 6], ids="in step {}".format)
def test_a_run_that_was_killed_stops_at_the_same_step(stopped, tmp_path, monkeypatch, death):
    """Between evaluations and checkpoints; what it waited for in vain before counts."""
    with monkeypatch.context() as patch:
        patch.setattr(LoraTrainer, "training_step", dying_step(death))
        with pytest.raises(KeyboardInterrupt):
            stop_early(tmp_path)
    out = stop_early(tmp_path, resume_from_checkpoint="auto")
    check_kept(out, BEST, LAST)
    assert_same_bits(out, stopped)
    assert eval_losses(out) == eval_losses(stopped)


def test_a_run_that_was_killed_behind_its_stop_takes_no_further_step(stopped, tmp_path, monkeypatch):
    def die(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "save_adapter", die)
        with pytest.raises(KeyboardInterrupt):
            stop_early(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(LoraTrainer, "training_step", lambda *args: pytest.fail("a step was taken"))
        out = stop_early(tmp_path, resume_from_checkpoint="latest")
    check_kept(out, BEST, LAST)
    assert_same_bits(out, stopped)


def test_a_run_that_stopped_early_is_finished_until_it_gets_more_patience(stopped, tmp_path, log_lines):
    out = shutil.copytree(stopped, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    stop_early(tmp_path, resume_from_checkpoint="auto")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert any(f"finished already, {LAST} steps are done" in line for line in log_lines)
    with pytest.raises(UserError, match=f"the run stopped early, at step {LAST}.* raise --early_stopping_patience"):
        stop_early(tmp_path, resume_from_checkpoint="latest")
    stop_early(tmp_path, resume_from_checkpoint="latest", early_stopping_patience=4)
    whole = stop_early(tmp_path, "whole", early_stopping_patience=4)
    assert eval_losses(out) == eval_losses(whole)
    assert max(eval_losses(out)) > LAST
    assert_same_bits(out, whole)


def test_the_best_checkpoint_that_is_gone_is_said(stopped, tmp_path, log_lines):
    out = shutil.copytree(stopped, tmp_path / "out", ignore=shutil.ignore_patterns(f"checkpoint-{BEST}"))
    path = out / f"checkpoint-{LAST}/trainer_state.json"
    state = read_json(path) | {"best_model_checkpoint": None}
    path.write_text(json.dumps(state), "utf-8")
    (out / f"checkpoint-{LAST}/manifest.json").unlink()
    record = read_json(out / f"checkpoint-{LAST}/run_config.json")
    del record["format_version"]
    (out / f"checkpoint-{LAST}/run_config.json").write_text(json.dumps(record), "utf-8")
    stop_early(tmp_path, args={"max_steps": LAST + 1}, resume_from_checkpoint="latest", early_stopping_patience=9)
    assert any(f"checkpoint-{BEST}, the best checkpoint so far, is gone" in line for line in log_lines)
    assert read_json(out / "all_results.json")["kept_step"] == LAST + 1


@pytest.mark.slow
def test_two_processes_agree_where_to_stop(write, tmp_path):
    """One that went on alone would wait for the other for ever."""
    args = {**ARGS, "learning_rate": 3.0, "per_device_train_batch_size": 1}
    run_two_processes(write, {**make_flags(tmp_path, tmp_path / "two", args), "early_stopping_patience": 2})
    losses = eval_losses(tmp_path / "two")
    best, last = min(losses, key=losses.get), max(losses)
    assert last == best + 2 < ARGS["max_steps"]
    check_kept(tmp_path / "two", best, last)


@pytest.mark.parametrize(
    ("args", "flags", "message"),
    [
        (
            {"eval_strategy": "no"},
            {},
            "--early_stopping_patience 3 needs evaluations. Set eval_strategy to steps or epoch",
        ),
        ({}, {"eval_data_path": None}, "--early_stopping_patience 3: no evaluation data. Give --eval_data_path"),
        ({}, {"early_stopping_patience": 0}, "--early_stopping_patience 0: expected 1 or more"),
        ({"save_strategy": "no"}, {}, "--early_stopping_patience 3 needs checkpoints. Set save_strategy to steps in"),
        ({"save_strategy": "epoch"}, {}, "eval_strategy is steps, save_strategy epoch. Set save_strategy to steps"),
        (
            {"eval_steps": 2},
            {},
            "a save_steps that is a multiple of eval_steps: they are 3 and 2. Set save_steps to 2",
        ),
        (
            {"eval_steps": 2, "load_best_model_at_end": True},
            {"early_stopping_patience": None},
            "load_best_model_at_end needs a save_steps that is a multiple of eval_steps",
        ),
    ],
)
def test_what_is_missing_is_said_before_a_model_is_opened(tmp_path, monkeypatch, args, flags, message):
    monkeypatch.setattr("glm_utils.training.settings.open_checkpoint", lambda *_: pytest.fail("a model was opened"))
    with pytest.raises(UserError) as error_info:
        stop_early(tmp_path, args=args, **flags)
    assert message in str(error_info.value)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({}, (0, 0)),
        ({1: 3.0}, (0, 1)),
        ({1: 3.0, 2: 2.0, 3: 2.0, 4: 2.5}, (2, 2)),  # as good is no better
        ({0: 1.0, 1: 3.0, 2: 4.0}, (1, 1)),  # before the first step
        ({1: 3.0, 2: float("nan")}, (1, 1)),
        ({1: "low", 2: 3.0}, (0, 2)),
    ],
)
def test_waiting_is_counted_from_the_history(losses, expected):
    history = [{"step": step, "eval_loss": loss} for step, loss in losses.items()]
    assert waited_since_best([{"step": 1, "loss": 1.0}, *history, *history[-1:]]) == expected
