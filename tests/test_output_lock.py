import subprocess
import sys
import time

import pytest

from glm_utils.cli import UserError
from glm_utils.output_lock import lock_output

HOLDER = """
import sys, time
from pathlib import Path
from glm_utils.output_lock import lock_output
with lock_output(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out/.lock")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_in_one_line(holder, tmp_path):
    with (
        pytest.raises(UserError, match="output_dir x is in use by another run"),
        lock_output(tmp_path / "out/.lock", "output_dir x", grace_seconds=0.1),
    ):
        pass


def test_the_lock_of_a_killed_process_is_free_again(holder, tmp_path):
    holder.kill()
    holder.wait()
    started = time.monotonic()
    with lock_output(tmp_path / "out/.lock", "it", grace_seconds=0):
        assert time.monotonic() - started < 5


def test_a_run_that_is_just_ending_is_waited_for(holder, tmp_path):
    subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {holder.pid}"])
    with lock_output(tmp_path / "out/.lock", "it", grace_seconds=20):
        assert (tmp_path / "out/.lock").is_file()
