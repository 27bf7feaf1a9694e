"""Checkpoints that survive kills, full disks and damage; one run per output directory; nothing of others deleted."""

import functools
import json
import os
import shutil
import signal
import stat
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import train_qlora as stage
from glm_utils.cli import UserError
from glm_utils.family import PROJECT_DIR
from glm_utils.files import write_json
from glm_utils.output_lock import lock_output
from glm_utils.training import checkpoints, disk_space, lora_model, output, trainer
from glm_utils.training import run as training_run
from glm_utils.training.manifest import checkpoint_fault
from glm_utils.training.resume import find_checkpoint

MODEL_DIR = PROJECT_DIR / "tests/fixtures/chatglm2-6b/model"
EXAMPLES = [
    {"content": f"类型#{kind}*颜色#{color}色", "summary": f"{color}色的{kind}，百搭又时尚。"}
    for kind in ("上衣", "裤子", "裙子")
    for color in "白黑红蓝绿"
]
ARGS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "save_steps": 1}
ARGS |= {"learning_rate": 1e-2, "logging_steps": 1, "warmup_steps": 0, "report_to": "none", "disable_tqdm": True}
ARGS |= {"use_cpu": True}
BEST = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1}
BEST |= {"learning_rate": 0.3, "lr_scheduler_type": "constant", "max_steps": 5}  # the loss goes up, down and up
ADAPTER = "adapter_model.safetensors"


def make_flags(directory, out, args):
    """Write the files of a run into a directory; return the flags of the command."""
    values = {**ARGS, "output_dir": str(out), **args}
    paths = {"train_args_json": directory / "args.json", "train_data_path": directory / "train.json"}
    for path, content in zip(paths.values(), (values, EXAMPLES), strict=True):
        path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    if "eval_strategy" in args:
        paths["eval_data_path"] = directory / "dev.json"
        paths["eval_data_path"].write_text(json.dumps(EXAMPLES[:4], ensure_ascii=False), "utf-8")
    return {"model_name_or_path": str(MODEL_DIR), **{name: str(path) for name, path in paths.items()}}


def run(directory, out, args=None, **flags):
    stage.train_qlora(**{**make_flags(directory, out, args or {}), **flags})
    return out


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """An uninterrupted run with a checkpoint at each of its four steps."""
    directory = tmp_path_factory.mktemp("complete")
    return run(directory, directory / "out")


@pytest.fixture(scope="module")
def complete_best(tmp_path_factory):
    """An uninterrupted run that keeps the best of its checkpoints."""
    directory = tmp_path_factory.mktemp("best")
    return run(directory, directory / "out", BEST)


@pytest.fixture
def train(tmp_path):
    return lambda name="out", args=None, **flags: run(tmp_path, tmp_path / name, args, **flags)


@pytest.fixture
def out(complete, tmp_path):
    """A copy of two checkpoints, as a run leaves them that was killed behind its third step."""
    for step in (2, 3):
        shutil.copytree(complete / f"checkpoint-{step}", tmp_path / "out" / f"checkpoint-{step}")
    shutil.copyfile(complete / "run_config.json", tmp_path / "out/run_config.json")
    return tmp_path / "out"


@pytest.fixture
def old_out(out):
    """The same as an earlier version of this project would have left them."""
    for checkpoint in out.glob("checkpoint-*"):
        (checkpoint / "manifest.json").unlink()
        record = json.loads((checkpoint / "run_config.json").read_text())
        del record["format_version"]
        (checkpoint / "run_config.json").write_text(json.dumps(record))
    return out


def same_adapter(first, second):
    first, second = load_file(first / ADAPTER), load_file(second / ADAPTER)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def hidden(directory):
    return [path.name for path in directory.iterdir() if path.name.startswith(".")]


# ---- what a checkpoint holds


def test_the_manifest_names_every_file(complete):
    for step in range(1, 5):
        checkpoint = complete / f"checkpoint-{step}"
        files = json.loads((checkpoint / "manifest.json").read_text())["files"]
        assert files.keys() | {"manifest.json"} == {path.name for path in checkpoint.iterdir()}
        assert {ADAPTER, "optimizer.pt", "scheduler.pt", "rng_state.pth", "run_config.json"} < files.keys()
        assert checkpoint_fault(checkpoint) is None
    assert hidden(complete) == []


def test_files_are_readable_by_a_group(train):
    before = os.umask(0o027)
    try:
        out = train(args={"max_steps": 1})
    finally:
        os.umask(before)
    paths = [path for path in out.rglob("*") if path.is_file()]
    modes = {str(path.relative_to(out)): stat.S_IMODE(path.stat().st_mode) for path in paths}
    assert {name for name, mode in modes.items() if mode != 0o640} == set()
    assert {ADAPTER, f"checkpoint-1/{ADAPTER}"} < modes.keys()


def test_a_link_in_place_of_a_temporary_file_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in (".run_config.json.tmp", "run_config.json"):
        (tmp_path / name).symlink_to(victim)
    write_json(tmp_path / "run_config.json", {"a": 1})
    assert victim.read_text() == "mine"
    assert json.loads((tmp_path / "run_config.json").read_text()) == {"a": 1}
    assert not (tmp_path / "run_config.json").is_symlink()


# ---- damage


def noise(data):
    middle = len(data) // 2
    return data[:middle] + bytes(255 - byte for byte in data[middle : middle + 16]) + data[middle + 16 :]


DAMAGES = {"deleted": None, "empty": lambda data: b"", "cut": lambda data: data[:-9], "noise": noise}
DAMAGES |= {"longer": lambda data: data + b"\0"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damaged_file_is_named_and_the_checkpoint_before_is_taken(out, damage):
    newest, warnings = out / "checkpoint-3", []
    for path in sorted(newest.iterdir()):
        data = path.read_bytes()
        path.write_bytes(DAMAGES[damage](data)) if DAMAGES[damage] else path.unlink()
        assert find_checkpoint("latest", out, warnings.append) == out / "checkpoint-2", path
        assert "passed over: " in warnings[-1]
        assert "checkpoint-3" in warnings[-1]
        assert path.name in warnings[-1]
        assert "Download" not in warnings[-1]
        path.write_bytes(data)
    assert find_checkpoint("latest", out, warnings.append) == newest
    assert len(warnings) == len(list(newest.iterdir()))


def test_noise_in_weights_is_an_error_where_the_checkpoint_is_named(out):
    path = out / "checkpoint-3" / ADAPTER
    path.write_bytes(noise(path.read_bytes()))
    with pytest.raises(UserError, match=rf"checkpoint-3/{ADAPTER}: its content differs from manifest.json"):
        find_checkpoint(str(out / "checkpoint-3"), out, print)


def test_nothing_complete_is_an_error_for_latest_and_a_first_start_for_auto(out):
    for path in out.glob("checkpoint-*/optimizer.pt"):
        path.unlink()
    warnings = []
    with pytest.raises(UserError, match="no complete checkpoint in .*checkpoint-3.*optimizer.pt missing"):
        find_checkpoint("latest", out, warnings.append)
    assert find_checkpoint("auto", out, warnings.append) is None
    assert len(warnings) == 4


@pytest.mark.parametrize(
    "content", [{"format": 1}, {"files": {"a": 1}}, {"files": {"../x": {"bytes": 0, "sha256": ""}}}]
)
def test_a_broken_manifest_is_a_fault(out, content):
    (out / "checkpoint-3/manifest.json").write_text(json.dumps(content))
    assert "manifest.json: broken" in checkpoint_fault(out / "checkpoint-3")


def test_a_checkpoint_of_an_earlier_version_is_accepted_and_the_log_says_so(old_out, complete, tmp_path, log_lines):
    run(tmp_path, old_out, resume_from_checkpoint="latest")
    assert same_adapter(old_out, complete)
    (line,) = [line for line in log_lines if "written by another version" in line]
    assert "format 1 -> 2" in line
    assert "no manifest.json, so only the structure of its files was checked" in line


STATE = "trainer_state.json"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (STATE, lambda data: b"{}"),
        (STATE, lambda data: data.replace(b'"global_step": 3', b'"global_step": "three"')),
        (STATE, lambda data: data.replace(b'"best_metric": null', b'"best_metric": "good"')),
        (STATE, lambda data: b'{"unknown": 1}'),
        (STATE, lambda data: data[:-20]),
        (STATE, lambda data: b"[" * 100_000),
        ("rng_state.pth", lambda data: data[:-50]),
        ("rng_state.pth", lambda data: b""),
        ("optimizer.pt", noise),
        ("optimizer.pt", lambda data: data[:300] + b"noise" + data[305:]),
        ("scheduler.pt", lambda data: b"PK"),
        ("adapter_config.json", lambda data: b"{"),
        (ADAPTER, lambda data: data[:-4]),
        ("run_config.json", None),
    ],
)
def test_damage_is_found_without_a_manifest_too(old_out, name, change):
    path, warnings = old_out / "checkpoint-3" / name, []
    path.write_bytes(change(path.read_bytes())) if change else path.unlink()
    assert find_checkpoint("latest", old_out, warnings.append) == old_out / "checkpoint-2"
    assert name in warnings[0]
    assert "Download" not in warnings[0]


def test_what_changed_since_the_checkpoint_is_one_line(out, tmp_path, log_lines, monkeypatch):
    path = out / "checkpoint-3/run_config.json"
    record = json.loads(path.read_text())
    record["versions"]["transformers"] = "5.17.0"
    record["versions"]["chatglm-qlora-toolkit"] = "0.1.0"
    record["commit"] = "abc"
    path.write_text(json.dumps(record))
    (out / "checkpoint-3/manifest.json").unlink()
    checkpoints.write_manifest(out / "checkpoint-3")
    run(tmp_path, out, dry_run=True, resume_from_checkpoint="latest")
    (line,) = [line for line in log_lines if "written by another version" in line]
    assert "transformers 5.17.0 -> 5." in line
    assert "chatglm-qlora-toolkit 0.1.0 -> " in line
    assert "commit abc -> " in line
    assert "torch" not in line


# ---- kills


def killed_run(point, directory, out, args, **flags):
    """Run in a child that dies without a word when it is about to touch the disk for the point-th time.

    Returns:
        Whether it died.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            left = [point]

            def counted(function, *args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            for owner, names in (
                (os, ("rename", "replace", "fsync")),
                (shutil, ("rmtree", "copyfile")),
                (torch, ("save",)),
            ):
                for name in names:
                    setattr(owner, name, functools.partial(counted, getattr(owner, name)))
            run(directory, out, args, **flags)
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("args", [{}, BEST], ids=["plain", "best"])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(complete, complete_best, tmp_path, args):
    """One command serves all starts; each time it dies a little later between its first and its last file."""
    expected, out, deaths = (complete_best if args else complete), tmp_path / "out", 0
    for point in (2, 9, 21, 26, 33, 58, 75, 90, 110, 10_000):
        deaths += killed_run(point, tmp_path, out, args, resume_from_checkpoint="auto")
        for checkpoint in out.glob("checkpoint-*"):
            assert checkpoint_fault(checkpoint) is None
        if (out / "adapter_config.json").exists():
            assert same_adapter(out, expected)
    assert deaths >= 5
    assert same_adapter(out, expected)
    assert hidden(out) == []
    kept = [f"checkpoint-{step}" for step in ((4, 5) if args else (1, 2, 3, 4))]
    assert sorted(path.name for path in out.glob("checkpoint-*")) == kept


def test_a_first_start_that_died_in_its_first_save_starts_over_without_a_flag(complete, tmp_path, monkeypatch):
    def die(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_manifest", die)
        patch.setattr(trainer.shutil, "rmtree", lambda *args, **kwargs: None)  # as kill -9 leaves it
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, tmp_path / "out")
    assert hidden(tmp_path / "out") == [".checkpoint-1.incomplete"]
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert same_adapter(run(tmp_path, tmp_path / "out"), complete)
    assert hidden(tmp_path / "out") == []


def test_a_run_killed_behind_its_last_step_only_writes_the_adapter(out, complete, tmp_path, log_lines):
    shutil.copytree(complete / "checkpoint-4", out / "checkpoint-4")
    for word in ("latest", "auto"):
        run(tmp_path, out, resume_from_checkpoint=word)
        assert same_adapter(out, complete)
        assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 4
        (out / "adapter_config.json").unlink()
    assert not any("train_loss 0" in line for line in log_lines if "SUCCESS" in line)


def test_auto_ends_at_once_where_the_run_is_finished(complete, tmp_path, log_lines):
    out = tmp_path / "out"
    shutil.copytree(complete, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    run(tmp_path, out, resume_from_checkpoint="auto")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert any(
        "finished already, 4 steps are done and the adapter is written; nothing to do" in line for line in log_lines
    )
    with pytest.raises(UserError, match="seed is 42 in the checkpoint and 1 now"):
        run(tmp_path, out, resume_from_checkpoint="auto", seed=1)


def test_a_run_that_goes_on_has_no_finished_adapter(complete, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(complete, out)
    monkeypatch.setattr(training_run, "save_adapter", lambda *args: None)
    run(tmp_path, out, {"max_steps": 5}, resume_from_checkpoint="auto")
    assert not (out / "adapter_config.json").exists()
    assert not (out / ADAPTER).exists()


# ---- rotation, the best checkpoint


def test_the_best_checkpoint_and_the_newest_stay(complete_best, log_lines):
    state = json.loads((complete_best / "trainer_state.json").read_text())
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    best = losses.index(min(losses)) + 1
    assert best == 4  # else this proves less
    assert sorted(path.name for path in complete_best.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    for step in (4, 5):
        state = json.loads((complete_best / f"checkpoint-{step}/trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(complete_best / "checkpoint-4")
    assert same_adapter(complete_best, complete_best / "checkpoint-4")
    metrics = json.loads((complete_best / "all_results.json").read_text())
    assert metrics["eval_loss"] == min(losses)


def test_the_last_line_names_the_kept_evaluation(train, log_lines):
    losses = json.loads((train(args=BEST) / "trainer_state.json").read_text())["log_history"]
    best = min(entry["eval_loss"] for entry in losses if "eval_loss" in entry)
    (line,) = [line for line in log_lines if "adapter written to" in line]
    assert f"eval_loss {best:.4f}, of the best step, 4" in line


def test_the_best_checkpoint_is_found_in_a_directory_that_was_moved(complete_best, tmp_path):
    out = tmp_path / "moved"
    shutil.copytree(complete_best, out)
    path = out / "checkpoint-5/trainer_state.json"
    path.write_text(path.read_text().replace(str(complete_best), str(tmp_path / "gone")))
    (out / "checkpoint-5/manifest.json").unlink()
    checkpoints.write_manifest(out / "checkpoint-5")
    (out / "adapter_config.json").unlink()
    run(tmp_path, out, BEST, resume_from_checkpoint="auto")
    assert same_adapter(out, complete_best)


def test_rotation_counts_this_runs_checkpoints_only(complete, tmp_path):
    for step in (1, 2, 3, 4):
        shutil.copytree(complete / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-0").mkdir()
    (tmp_path / "checkpoint-0/pytorch_model.bin").write_text("of another program")
    checkpoints.rotate_checkpoints(tmp_path, 2, 3, str(tmp_path / "checkpoint-1"))
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["0", "1", "3", "4"]
    checkpoints.rotate_checkpoints(tmp_path, None, 4, None)
    checkpoints.rotate_checkpoints(tmp_path, 1, 4, None)
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["0", "4"]


# ---- other programs, other runs


def test_nothing_of_another_program_is_deleted(out, complete, tmp_path, log_lines):
    """A foreign checkpoint stays; where this run needs its name, it is moved aside. What a link points to stays."""
    elsewhere = tmp_path / "elsewhere"
    (out / "checkpoint-3").rename(elsewhere)
    (out / "checkpoint-3").symlink_to(elsewhere)
    for name in ("checkpoint-1", "checkpoint-99"):
        (out / name).mkdir()
        (out / name / "model.bin").write_text(name)
    (out / "checkpoint-4").symlink_to(tmp_path / "nothing")
    run(tmp_path, out, {"overwrite_output_dir": True, **BEST, "max_steps": 4})
    assert (out / "checkpoint-99/model.bin").read_text() == "checkpoint-99"
    assert (out / "checkpoint-1.old1/model.bin").read_text() == "checkpoint-1"
    assert checkpoint_fault(elsewhere) is None
    assert os.path.islink(out / "checkpoint-4.old1")
    assert checkpoint_fault(out / "checkpoint-4") is None
    assert any("moved to checkpoint-1.old1" in line for line in log_lines)


def test_an_adapter_of_another_program_is_not_replaced(train, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match="holds adapter_config.json, which no run of this script wrote"):
        train(args={"overwrite_output_dir": True})


def test_a_second_run_is_refused_in_one_line(train, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "lock_output", functools.partial(lock_output, grace_seconds=0.1))
    monkeypatch.setattr(lora_model, "make_lora_model", lambda *args: pytest.fail("a model is loaded"))
    with lock_output(tmp_path / "out/.lock", "it"):
        with pytest.raises(UserError, match=r"^output_dir .*out is in use by another run"):
            train()
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


# ---- disks


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("place", ["/proc/nothing/out", "/proc/self/out"])
def test_an_output_dir_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    train, monkeypatch, dry_run, place
):
    monkeypatch.setattr(lora_model, "make_lora_model", lambda *args: pytest.fail("a model is loaded"))
    with pytest.raises(UserError, match="output_dir cannot be"):
        train(args={"output_dir": place}, dry_run=dry_run)


@pytest.fixture
def free_space(monkeypatch):
    usage = shutil.disk_usage("/")
    return lambda free: monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: usage._replace(free=free))


def full_disk(error, at, function):
    """Return a function that raises an error in its at-th call."""
    calls = []

    def limited(*args, **kwargs):
        calls.append(0)
        if len(calls) == at:
            raise error
        return function(*args, **kwargs)

    return limited


@pytest.mark.parametrize(
    ("error", "at"),
    [
        (OSError(28, "No space left on device"), 5),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), 6),
        (OSError(122, "Disk quota exceeded"), 1),
    ],
    ids=["ENOSPC", "torch", "quota"],
)
def test_a_full_disk_is_one_line_and_the_next_start_goes_on(complete, tmp_path, monkeypatch, error, at):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk(error, at, torch.save))
        last = {5: "latest goes on from checkpoint-1", 6: "latest goes on from checkpoint-1", 1: "starts again"}[at]
        with pytest.raises(UserError, match=rf"^output_dir .*(the disk is full|quota).*({last})"):
            run(tmp_path, out)
    assert hidden(out) == []
    assert all(checkpoint_fault(path) is None for path in out.glob("checkpoint-*"))
    assert same_adapter(run(tmp_path, out, resume_from_checkpoint="auto"), complete)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
@pytest.mark.parametrize("kilobytes", [200, 440])
def test_a_small_disk(complete, tmp_path, kilobytes):
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount")
    try:
        with pytest.raises(UserError, match="the disk is full"):
            run(tmp_path, place / "out")
        assert hidden(place / "out") == []
        subprocess.run(["mount", "-o", "remount,size=9m", str(place)], check=True)
        assert same_adapter(run(tmp_path, place / "out", resume_from_checkpoint="auto"), complete)
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(
    ("free", "args", "message"),
    [
        (200_000, {}, "lower save_total_limit (now None)"),
        (200_000, {"save_total_limit": 2}, "lower save_total_limit (now 2)"),
        (400_000, {"save_total_limit": 2}, None),
        (60_000, {"save_strategy": "no"}, None),
    ],
)
def test_a_warning_comes_where_not_all_checkpoints_fit(train, free_space, log_lines, free, args, message):
    free_space(free)
    train(args=args, dry_run=True)
    warnings = [line for line in log_lines if line.startswith("WARNING") and "this run will take" in line]
    assert [message in line for line in warnings] == ([True] if message else [])


@pytest.mark.parametrize(
    ("free", "args", "message"),
    [
        (50_000, {}, "50 kB free, and a checkpoint takes about"),
        (20_000, {"save_strategy": "no"}, "20 kB free, and the adapter takes about"),
    ],
)
def test_a_disk_without_room_for_one_is_refused_before_the_first_step(train, free_space, free, args, message):
    free_space(free)
    with pytest.raises(UserError, match=message):
        train(args=args, dry_run=True)


# ---- two processes


def torchrun(tmp_path, args, expect=0, **flags):
    flags = {**make_flags(tmp_path, tmp_path / "two", args), **flags}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "train_qlora.py",
    ]
    command += [f"--{name}={value}" for name, value in flags.items()]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == expect, done.stderr
    return done.stderr


@pytest.mark.slow
def test_two_processes_save_one_checkpoint_and_go_on_from_it(tmp_path):
    args = {**BEST, "gradient_accumulation_steps": 1, "max_steps": 3}
    torchrun(tmp_path, args)
    out, whole = tmp_path / "two", tmp_path / "whole"
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]
    for checkpoint in out.glob("checkpoint-*"):
        files = json.loads((checkpoint / "manifest.json").read_text())["files"]
        assert {"rng_state_0.pth", "rng_state_1.pth"} < files.keys()
        assert checkpoint_fault(checkpoint) is None
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(out / "checkpoint-1")
    assert same_adapter(out, out / "checkpoint-1")
    out.rename(whole)
    shutil.copytree(whole / "checkpoint-1", out / "checkpoint-1")
    shutil.copytree(whole / "checkpoint-1", out / ".checkpoint-3.incomplete")
    assert "going on from" in torchrun(tmp_path, args, resume_from_checkpoint="auto")
    assert all(same_adapter(out / name, whole / name) for name in ("", "checkpoint-3"))
    assert hidden(out) == []


@pytest.mark.slow
def test_two_processes_are_refused_together(tmp_path):
    with lock_output(tmp_path / "two/.lock", "it"):
        log = torchrun(tmp_path, {}, expect=1)
    lines = [line for line in log.splitlines() if "ERROR" in line and "in use by another run" in line]
    assert len(lines) == 1
