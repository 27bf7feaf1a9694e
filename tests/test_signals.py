"""Signals: one line and 128 + N, nothing left behind; training saves a checkpoint first and says how to go on."""

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing import event_accumulator
from transformers import Trainer

import merge_lora_and_quantize
import train_qlora
from glm_utils import signals
from glm_utils.cli import UserError, run_cli
from glm_utils.evaluation import at_end
from glm_utils.family import PROJECT_DIR
from glm_utils.merging import reload_check
from glm_utils.training import preflight
from glm_utils.training import run as training_run
from glm_utils.training.stop_request import resume_command, with_lasting_workers
from glm_utils.training.trainer import LoraTrainer
from glm_utils.training.training_args import read_train_args

ROWS = [
    {"content": f"类型#{kind}", "summary": f"{kind}，百搭又时尚。"}
    for kind in ("上衣", "裤子", "裙子", "外套", "帽子")
]
ARGS = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_steps": 2,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
MODEL_DIR = PROJECT_DIR / "tests/fixtures/chatglm2-6b/model"
SIGNALS = pytest.mark.parametrize("signum", signals.STOP_SIGNALS, ids=lambda signum: signum.name)


@pytest.fixture(autouse=True)
def _python_hears_ctrl_c():
    """Have Ctrl-C heard also where the tests run in the background of a shell, which ignores it there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def flags(write, tmp_path):
    """Flags of a training into tmp_path/out; JSON keys as arguments."""

    def make(name="out", **args):
        rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
        args_path = write(f"{name}.json", {**ARGS, **args, "output_dir": str(tmp_path / name)})
        paths = {"train_args_json": args_path, "train_data_path": write("train.jsonl", rows)}
        if args.get("eval_strategy"):
            paths["eval_data_path"] = paths["train_data_path"]
        return [f"--{key}={value}" for key, value in {**paths, "model_name_or_path": MODEL_DIR}.items()]

    return make


@pytest.fixture
def end(monkeypatch, capsys):
    """Run a stage as a command; return its exit code, its last line and everything on standard error."""

    def run(argv, stage=train_qlora.train_qlora, command=("python", "train_qlora.py")):
        monkeypatch.setattr(sys, "orig_argv", [*command, *argv])
        code = 0
        try:
            run_cli(stage, argv)
        except SystemExit as error:
            code = error.code
        err = capsys.readouterr().err
        return code, err.rstrip("\n").rpartition("\n")[2], err

    return run


def send_at(monkeypatch, owner, name, signum, call=1, before=True):
    """Send this process a signal in a method's n-th call."""
    method, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if before and len(calls) == call:
            signal.raise_signal(signum)
        result = method(*args, **kwargs)
        if not before and len(calls) == call:
            signal.raise_signal(signum)
        return result

    monkeypatch.setattr(owner, name, wrapped)


def adapter_bits(path):
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(path / "adapter_model.safetensors").items()}


def steps_of(out):
    return sorted(int(path.name.partition("-")[2]) for path in out.glob("checkpoint-*"))


# ---- training


@SIGNALS
def test_a_signal_saves_and_the_last_line_goes_on(end, flags, monkeypatch, tmp_path, signum):
    send_at(monkeypatch, LoraTrainer, "training_step", signum, call=3)
    code, last, err = end(flags())
    out = tmp_path / "out"
    assert code == (130 if signum == signal.SIGINT else 75)
    assert steps_of(out) == [2, 3]
    assert "SUCCESS" not in err
    assert not (out / "adapter_config.json").exists()
    words = shlex.split(last)
    assert words[:2] == ["python", "train_qlora.py"]
    assert words[-2:] == ["--resume_from_checkpoint", "latest"]
    if signum == signal.SIGTERM:
        assert end(words[2:])[0] == 0
        assert end(flags("uninterrupted"))[0] == 0
        assert adapter_bits(out) == adapter_bits(tmp_path / "uninterrupted")


MOMENTS = {  # what is running, in which call, and the checkpoints that are there when the run has ended
    "evaluation": (LoraTrainer, "prediction_step", 2, [2, 3], {"eval_strategy": "steps", "eval_steps": 3}),
    "a save": (Trainer, "_save_checkpoint", 1, [2], {}),
    "a save without optimizer": (Trainer, "_save_checkpoint", 1, [2, 3], {"save_only_model": True}),
    "the first step": (LoraTrainer, "training_step", 1, [1], {"save_strategy": "no"}),
    "the best model is kept": (LoraTrainer, "training_step", 5, [2, 4, 5], {
        "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
    }),
}  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_leaves_a_checkpoint(end, flags, monkeypatch, tmp_path, moment):
    owner, name, call, steps, args = MOMENTS[moment]
    send_at(monkeypatch, owner, name, signal.SIGTERM, call)
    code, last, err = end(flags(**args))
    assert code == 75, err
    assert steps_of(tmp_path / "out") == steps
    assert last.endswith("--resume_from_checkpoint latest")
    newest = tmp_path / f"out/checkpoint-{steps[-1]}"
    assert {"optimizer.pt", "scheduler.pt", "trainer_state.json", "run_config.json"} <= {
        path.name for path in newest.iterdir()
    }
    if moment == "evaluation":  # it is finished, and part of what is saved
        assert "eval_loss" in (newest / "trainer_state.json").read_text()


def test_points_of_a_stopped_run_reach_tensorboard(end, flags, monkeypatch, tmp_path):
    send_at(monkeypatch, LoraTrainer, "training_step", signal.SIGTERM, call=2)
    assert end(flags(report_to="tensorboard"))[0] == 75
    (directory,) = (tmp_path / "out/runs").iterdir()
    events = event_accumulator.EventAccumulator(str(directory)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]


@pytest.mark.parametrize(
    ("owner", "name", "signum"),
    [(preflight, "plan_run", signal.SIGTERM), (Trainer, "create_optimizer", signal.SIGINT)],
)
def test_before_the_first_step_there_is_nothing_to_save(end, flags, monkeypatch, tmp_path, owner, name, signum):
    send_at(monkeypatch, owner, name, signum)
    code, last, err = end(flags())
    assert code == 128 + signum
    assert last.endswith(
        f"interrupted by {signals.signal_name(signum)}: no step was done, so there is nothing to save"
    )
    assert "Traceback" not in err
    assert not steps_of(tmp_path / "out")


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(LoraTrainer, "training_step", 6), (training_run, "save_adapter", 1)],
)
def test_a_signal_behind_the_last_step_lets_the_run_finish(end, flags, monkeypatch, tmp_path, owner, name, call):
    send_at(monkeypatch, owner, name, signal.SIGTERM, call)
    code, last, err = end(flags(save_strategy="no"))
    assert code == 0, err
    assert "SUCCESS adapter written" in last
    assert (tmp_path / "out/adapter_config.json").is_file()


def test_a_signal_behind_the_last_step_skips_the_evaluation_that_was_asked_for(end, flags, monkeypatch, tmp_path):
    send_at(monkeypatch, training_run, "save_adapter", signal.SIGTERM)
    monkeypatch.setattr(at_end, "evaluate_output", lambda *args, **kwargs: pytest.fail("evaluated"))
    code, last, _ = end([*flags(eval_strategy="steps", save_strategy="no"), "--evaluate_after"])
    assert code == 143
    assert last.endswith("the adapter is written, but not evaluated")
    assert (tmp_path / "out/adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--seed", "3"], "--seed 3 --resume_from_checkpoint latest"),
        (["--resume_from_checkpoint", "auto", "--seed=3"], "--seed=3 --resume_from_checkpoint auto"),
        (["--resume-from-checkpoint=auto"], "--resume_from_checkpoint auto"),
        (["--resume_from_checkpoint", "out/checkpoint-5"], "--resume_from_checkpoint latest"),
        (["--resume_from_checkpoint", "--seed=3"], "--seed=3 --resume_from_checkpoint latest"),
        (["--prompt_text", "a b; $c", "--resume_from_checkpoint=latest"],
         "--prompt_text 'a b; $c' --resume_from_checkpoint latest"),
        (["--prompt_text", "resume_from_checkpoint auto"],
         "--prompt_text 'resume_from_checkpoint auto' --resume_from_checkpoint latest"),
    ],
)  # fmt: skip
def test_the_command_that_goes_on(words, expected):
    assert resume_command(["python", "train_qlora.py", *words]) == f"python train_qlora.py {expected}"


def test_enable_jit_checkpoint_is_refused(write):
    path = write("args.json", {"output_dir": "out", "enable_jit_checkpoint": True})
    with pytest.raises(UserError, match="enable_jit_checkpoint is not supported: .*SIGTERM saves a checkpoint"):
        read_train_args(path)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_of_a_data_loader_outlive_a_signal_to_the_group(persistent):
    loader = torch.utils.data.DataLoader(range(40), num_workers=1, persistent_workers=persistent)
    numbers = []
    for batch in with_lasting_workers(loader):
        numbers.append(int(batch))
        if len(numbers) == 5:
            for child in torch.multiprocessing.active_children():
                for signum in signals.STOP_SIGNALS:
                    os.kill(child.pid, signum)
    assert numbers == list(range(40))


def leave_with_workers():
    """End a process that multiprocessing started while a loader's worker is alive."""
    loader = with_lasting_workers(torch.utils.data.DataLoader(range(40), num_workers=1, persistent_workers=True))
    torch.left_over = iter(loader)  # nobody shuts it down
    next(torch.left_over)


def test_a_child_process_leaves_its_workers():
    """As a program that starts trainings with multiprocessing does; functions of atexit do not run in it in time."""
    process = torch.multiprocessing.get_context("fork").Process(target=leave_with_workers)
    process.start()
    process.join(30)
    if process.is_alive():
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
    process.join()
    assert process.exitcode == 0


# ---- two processes


RANKS_ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
def test_two_processes_agree_on_the_step(flags, tmp_path):
    """The second process gets the signal; both stop behind one checkpoint, and the printed command is torchrun's."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["train_qlora.py", *flags(max_steps=200, save_steps=500)]
    pipes = {"stderr": subprocess.PIPE, "text": True, "cwd": PROJECT_DIR, "env": RANKS_ENVIRONMENT}
    with subprocess.Popen(command, **pipes) as agent:
        lines = []
        for line in agent.stderr:
            lines.append(line)
            if " step 2/" in line:
                os.kill(process_of_rank(agent.pid, 1), signal.SIGTERM)
    text = "".join(lines)
    (step,) = steps_of(tmp_path / "out")
    assert 3 <= step <= 40, text
    assert text.count("exitcode  : 75") == 2, text  # torchrun's report
    assert f"SIGTERM: stopped at step {step}/200" in text
    (last,) = [line for line in lines if "--resume_from_checkpoint latest" in line]
    assert "--nproc_per_node 2 train_qlora.py" in last
    assert "SUCCESS" not in text
    state = json.loads((tmp_path / f"out/checkpoint-{step}/trainer_state.json").read_text())
    assert state["global_step"] == step


def process_of_rank(agent_id, rank):
    """Return the process id of a rank."""
    with open(f"/proc/{agent_id}/task/{agent_id}/children") as file:
        children = [int(word) for word in file.read().split()]
    for child in children:
        with open(f"/proc/{child}/environ") as file:
            if f"\0LOCAL_RANK={rank}\0" in file.read():
                return child
    raise AssertionError(f"no rank {rank} below {agent_id}")


# ---- every other command


def work(*, seconds: float = 5.0) -> None:
    """Hold a temporary directory and work.

    Args:
        seconds: How long.
    """
    with tempfile.TemporaryDirectory(prefix="signals_test_"):
        threading.Timer(0.1, os.kill, (os.getpid(), SENT[0])).start()
        time.sleep(seconds)


SENT = []


@SIGNALS
def test_a_signal_is_one_line_and_temporaries_go(end, signum):
    before = set(os.listdir(tempfile.gettempdir()))
    SENT[:] = [signum]
    code, last, err = end([], work)
    assert code == 128 + signum
    assert len(err.splitlines()) == 1
    assert "interrupted by" in last
    left = set(os.listdir(tempfile.gettempdir())) - before
    assert not [name for name in left if name.startswith("signals_test_")]


def test_handlers_are_restored(end):
    before = [signal.getsignal(signum) for signum in signals.STOP_SIGNALS]
    SENT[:] = [signal.SIGTERM]
    end([], work)
    assert [signal.getsignal(signum) for signum in signals.STOP_SIGNALS] == before


def test_an_ignored_signal_stays_ignored(end):
    """As under nohup, or in the background of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    SENT[:] = [signal.SIGINT]
    assert end(["--seconds=0.3"], work)[0] == 0


def test_a_signal_whose_exception_is_lost_comes_again(end, monkeypatch):
    """A finalizer cannot pass an exception on: Python would print it and go on."""
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    signals.quiet_interruptions()

    class Finalized:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    def stage() -> None:
        Finalized()
        time.sleep(5)

    code, _, err = end([], stage)
    assert code == 143
    assert len(err.splitlines()) == 1


def test_a_signal_that_a_library_turned_into_an_error(end):
    def stage() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException as error:
            raise ImportError("initialization failed") from error

    code, last, _ = end([], stage)
    assert code == 143
    assert last.endswith("interrupted by SIGTERM")


@SIGNALS
def test_a_second_signal_leaves_at_once_with_its_number(end, monkeypatch, signum):
    class Left(BaseException):
        pass

    def leave(code):
        raise Left(code)

    monkeypatch.setattr(signals.os, "_exit", leave)
    heard = []

    def stage() -> None:
        signals.take_signals(heard.append)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # the same one, sent to process and group
        assert heard == [signal.SIGTERM]
        monkeypatch.setattr(signals, "SAME_SIGNAL_SECONDS", -1)
        try:
            signal.raise_signal(signum)
        except Left as error:
            raise SystemExit(error.args[0]) from None

    assert end([], stage)[0] == 128 + signum


def test_a_merge_takes_its_child_along(end, monkeypatch, tmp_path):
    """SIGTERM while the written model is reloaded: no child, no output, no temporary directory is left."""
    children, popen = [], subprocess.Popen
    before = set(os.listdir(tempfile.gettempdir()))

    class Popen(popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            children.append(self)
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()

    monkeypatch.setattr(reload_check.subprocess, "Popen", Popen)

    def stage() -> None:
        with merge_lora_and_quantize.atomic_directory(tmp_path / "merged", False, "a stage") as directory:
            reload_check.check_reload(directory, "你好", [1], torch.zeros(1, 1), torch.device("cpu"))

    code, _, err = end([], stage)
    assert code == 143
    assert len(err.splitlines()) == 1
    (child,) = children
    assert child.returncode == -signal.SIGKILL
    assert not list(tmp_path.iterdir())
    assert not [name for name in set(os.listdir(tempfile.gettempdir())) - before if name.startswith("tmp")]


# ---- processes of their own; they import no torch

ORPHAN = """
import os, subprocess, sys, time
code = f"import time; from glm_utils import signals; signals.end_with_parent({os.getpid()}, 0.05); time.sleep(60)"
print(subprocess.Popen([sys.executable, "-c", code]).pid, flush=True)
time.sleep(60)
"""
PROGRAM = """
import os, sys, time
import glm_utils
from glm_utils.cli import run_cli

def stage(*, what: str) -> None:
    print("a line " * 2000 if what == "long" else "a line", flush=what == "flush")
    print("READY", file=sys.stderr, flush=True)
    if what == "import":
        import slow
    time.sleep(20 if what == "sleep" else 0)

run_cli(stage)
"""


def program(*words, buffered=True, modules="", **options):
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1", "PYTHONPATH": str(modules)}
    command = [sys.executable, "-c", PROGRAM, *words]
    return subprocess.Popen(command, cwd=PROJECT_DIR, text=True, env=environment, **options)


def test_a_child_ends_with_a_killed_parent():
    pipe = {"cwd": PROJECT_DIR, "text": True, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", ORPHAN], **pipe) as parent:
        child_id = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 20
    while is_running(child_id):
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.05)


def is_running(pid):
    """Return whether a process exists that is no zombie."""
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return bool(file.read())
    except OSError:
        return False


@pytest.mark.parametrize(("what", "buffered"), [("flush", True), ("short", True), ("long", True), ("flush", False)])
def test_a_reader_that_leaves_ends_the_command_quietly(what, buffered):
    reader, writer = os.pipe()
    os.close(reader)
    with program("--what", what, buffered=buffered, stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        err = process.stderr.read()
    assert process.returncode == 141
    assert err.replace("READY\n", "") == ""


@pytest.mark.parametrize("what", ["flush", "short"])
def test_a_full_disk_behind_standard_output_is_one_line(what):
    with open("/dev/full", "w") as full, program("--what", what, stdout=full, stderr=subprocess.PIPE) as process:
        err = process.stderr.read().replace("READY\n", "")
    assert process.returncode == 1
    assert "standard output cannot be written (No space left on device)" in err
    assert len(err.splitlines()) == 1


def test_help_without_a_reader_and_closed_outputs():
    reader, writer = os.pipe()
    os.close(reader)
    with program("--help", stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        assert "Traceback" not in process.stderr.read()
    closed = [sys.executable, "-c", PROGRAM, "--what=short"]
    done = subprocess.run(["sh", "-c", f"exec {shlex.join(closed)} >&- 2>&-"], cwd=PROJECT_DIR)
    assert done.returncode == 0


@SIGNALS
def test_a_signal_ends_a_process_with_its_number(signum):
    with program("--what=sleep", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr.readline() == "READY\n"
        process.send_signal(signum)
        err = process.stderr.read()
    assert process.returncode == 128 + signum
    assert re.fullmatch(r"\S+ WARNING interrupted by \S+\n", err)


SWALLOWS = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGNUM)
    time.sleep(0.3)
except BaseException:
    pass
"""
LOST = """
import signal, time
import glm_utils

class Finalized:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

Finalized()
time.sleep(20)
"""


@SIGNALS
def test_a_signal_ends_the_imports_of_a_stage_at_once(signum, tmp_path):
    """Nothing is to be cleaned up yet; a library that catches everything does not matter."""
    slow = "import sys, time\ntry:\n print('IN IT', file=sys.stderr, flush=True)\n time.sleep(20)\nexcept: pass"
    (tmp_path / "slow.py").write_text(slow)
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with program("--what=import", modules=tmp_path, **pipes) as process:
        assert [process.stderr.readline(), process.stderr.readline()] == ["READY\n", "IN IT\n"]
        process.send_signal(signum)
        assert process.stderr.read() == f"interrupted by {signals.signal_name(signum)}\n"
    assert process.returncode == 128 + signum


@SIGNALS
def test_a_signal_is_heard_behind_the_import_that_it_interrupts(end, tmp_path, monkeypatch, signum):
    """Libraries catch what is raised while they import optional packages; a module that is half there stays broken."""
    (tmp_path / f"swallows_{signum}.py").write_text(SWALLOWS.replace("SIGNUM", signum.name) + "finished = True")
    monkeypatch.syspath_prepend(tmp_path)

    def stage() -> None:
        importlib.import_module(f"swallows_{signum}")
        time.sleep(5)

    code, _, err = end([], stage)
    assert code == 128 + signum
    assert len(err.splitlines()) == 1
    assert sys.modules[f"swallows_{signum}"].finished


def test_a_stage_can_take_a_signal_that_arrived_during_an_import(end, tmp_path, monkeypatch):
    (tmp_path / "swallows_taken.py").write_text(SWALLOWS.replace("SIGNUM", "SIGTERM"))
    monkeypatch.syspath_prepend(tmp_path)
    heard = []

    def stage() -> None:
        importlib.import_module("swallows_taken")
        signals.take_signals(heard.append)
        time.sleep(0.3)

    assert end([], stage)[0] == 0
    assert heard == [signal.SIGTERM]


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("import glm_utils, signal; signal.raise_signal(signal.SIGINT)", -signal.SIGINT),  # a shell shows 130
        (LOST, -signal.SIGINT),
        ("import glm_utils, swallows; time.sleep(20)", 130),
    ],
)
def test_ctrl_c_before_the_command_begins_is_one_line(code, exit_code, tmp_path):
    """Also where it is lost: in a finalizer, and while a library is imported."""
    (tmp_path / "swallows.py").write_text(SWALLOWS.replace("SIGNUM", "SIGINT"))
    script = PROJECT_DIR / "saved_files_script_of_a_test.py"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", f"exec(compile({code!r}, {str(script)!r}, 'exec'))"]
    done = subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, text=True, timeout=15, env=environment)
    assert done.stderr == "interrupted by Ctrl-C\n"
    assert done.returncode == exit_code
