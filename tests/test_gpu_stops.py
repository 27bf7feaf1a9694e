"""A training on GPUs that a signal or a killed rank interrupts goes on and ends with the same weights."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.campaign import trainings
from tests.campaign.harness import clean_log, wait_for
from tests.campaign.processes import Run
from tests.campaign.test_killed_ranks import find_rank
from tests.conftest import PROJECT_DIR

pytestmark = pytest.mark.gpu

NUM_STEPS = 200
ONE_GPU = {"CUDA_VISIBLE_DEVICES": "0"}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3"]


def words_of(directory, name, torchrun=()):
    """Write the inputs of a training on GPUs; return the words of its command."""
    script, *flags = trainings.prepare(directory, name, max_steps=NUM_STEPS, save_steps=20, use_cpu=False)
    return [*torchrun, str(PROJECT_DIR / script), *flags]


def start(directory, name, torchrun=(), environment=None):
    """Start a training in a Python of its own."""
    words = words_of(directory, name, torchrun)
    variables = {"PYTHONPATH": os.pathsep.join((str(PROJECT_DIR), os.environ.get("PYTHONPATH", "")))}
    return Run(words, directory, fresh=True, environment={**variables, **(environment or {})})


def wait_until_step(running, step):
    """Wait until the log reports a step's loss."""
    wait_for(lambda: running.code() is not None or step in trainings.steps_logged(clean_log(running.log_path)), 200)


def check_same_adapter(found, expected):
    """Compare adapters; kernels that add with atomics do not give the same bits twice."""
    found, expected = (load_file(path / "out" / trainings.ADAPTER) for path in (found, expected))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["a save at every step", "best model, one checkpoint kept"])
def test_a_stopped_run_on_a_gpu_goes_on(name, tmp_path):
    directories = {part: tmp_path / part for part in ("stopped", "whole")}
    whole = start(directories["whole"], name, environment=ONE_GPU)
    for signum, step, expected in ((signal.SIGTERM, 23, 75), (signal.SIGINT, 71, 130), (signal.SIGUSR1, 140, 75)):
        running = start(directories["stopped"], name, environment=ONE_GPU)
        wait_until_step(running, step)
        os.kill(running.pid, signum)
        assert running.wait(100) == expected, clean_log(running.log_path)[-3000:]
        assert max(trainings.checkpoint_steps(directories["stopped"] / "out")) >= step
        assert "--resume_from_checkpoint" in clean_log(running.log_path).splitlines()[-1]
        assert not (directories["stopped"] / "out" / trainings.ADAPTER).exists()
    last = start(directories["stopped"], name, environment=ONE_GPU)
    assert last.wait(200) == 0, clean_log(last.log_path)[-3000:]
    assert whole.wait(200) == 0, clean_log(whole.log_path)[-3000:]
    check_same_adapter(directories["stopped"], directories["whole"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_torchrun_restarts_a_killed_rank_on_gpus(tmp_path):
    name = "a save at every step"
    whole = start(tmp_path / "whole", name, TORCHRUN)
    assert whole.wait(300) == 0, clean_log(whole.log_path)[-3000:]
    running = start(tmp_path / "killed", name, TORCHRUN)
    wait_until_step(running, 50)
    pid = find_rank(running, 1)
    assert pid, clean_log(running.log_path)[-1000:]
    os.kill(pid, signal.SIGKILL)
    assert running.wait(300) == 0, clean_log(running.log_path)[-3000:]
    steps = trainings.steps_logged(clean_log(running.log_path))
    assert any(later <= earlier for earlier, later in zip(steps, steps[1:], strict=False)), "no restart"
    check_same_adapter(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_signal_to_torchrun_saves_on_gpus(tmp_path):
    name = "a save at every step"
    running = start(tmp_path, name, TORCHRUN)
    wait_until_step(running, 30)
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait(100) != 0
    steps = trainings.checkpoint_steps(tmp_path / "out")
    assert max(steps, default=0) >= 30, clean_log(running.log_path)[-3000:]
    again = start(tmp_path, name, TORCHRUN)
    assert again.wait(300) == 0, clean_log(again.log_path)[-3000:]
    assert min(trainings.steps_logged(clean_log(again.log_path))) > 30
