"""Outputs at every kind of place: links, mount points, odd names, full disks, two runs at once, kills at any step."""

import errno
import functools
import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from loguru import logger
from safetensors.torch import save_file
from transformers import dynamic_module_utils

from glm_utils import disk, output_dir, remote_code
from glm_utils.cli import UserError
from glm_utils.evaluation.job import check_output_dir
from glm_utils.evaluation.write import evaluate
from glm_utils.family import FAMILIES, PROJECT_DIR
from glm_utils.files import (
    atomic_files,
    check_free_space,
    check_output_file,
    check_writable,
    read_json_object,
    write_json,
)
from glm_utils.inference.answer_file import check_output_path, lock_answers, write_output
from glm_utils.inference.partial_answers import PartialAnswers
from glm_utils.inference.report import write_report
from glm_utils.merging.shards import ShardWriter, TensorSpec
from glm_utils.output_dir import atomic_directory, check_replaceable, lock_directory
from glm_utils.output_lock import lock_output
from glm_utils.report_file import check_report_path

STAGE = "some_stage"
RECORD = f'{{"stage": "{STAGE}"}}'
FILES = {"run_config.json": RECORD, "weights": "new", "config.json": "new"}
STEPS = ("rename", "replace", "mkdir", "rmdir", "unlink", "fsync")  # of os: what changes names or waits for the disk


def fill(directory, content="new"):
    for name, text in FILES.items():
        (directory / name).write_text(RECORD if name == "run_config.json" else text.replace("new", content))


def write(out, overwrite=True, content="new"):
    with atomic_directory(out, overwrite, STAGE) as directory:
        fill(directory, content)


def content_of(out):
    """Return what a directory holds: new, old, nothing, or half of something."""
    found = {path.name: path.read_text() for path in out.iterdir() if not path.name.startswith(".")}
    for name in ("new", "old"):
        if found == {**{key: text.replace("new", name) for key, text in FILES.items()}, "run_config.json": RECORD}:
            return name
    return "half" if found else "nothing"


def hidden(folder):
    return [path.name for path in folder.rglob(".*")]


@contextmanager
def file_size_limit(num_bytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def mount(tmp_path):
    """Mount a file system of its own; skips where that is not permitted."""
    mounted = []

    def run(name, *options):
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        command = ["mount", *(options or ("-t", "tmpfs", "tmpfs")), str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting is not permitted here")
        mounted.append(place)
        return place

    yield run
    for place in reversed(mounted):
        subprocess.run(["umount", "-l", str(place)], check=True)


# ---- links and mount points


@pytest.mark.parametrize("earlier", [None, "empty", "old"])
def test_a_link_stays_and_its_target_is_filled(tmp_path, earlier):
    far, out = tmp_path / "disk/far", tmp_path / "out"
    if earlier:
        far.mkdir(parents=True)
    if earlier == "old":
        fill(far, "old")
    out.symlink_to(far)
    check_replaceable(out, True, STAGE, [])
    write(out)
    assert out.is_symlink()
    assert content_of(far) == "new"
    assert hidden(tmp_path) == []


def test_links_in_a_circle_and_unusable_paths_are_refused_before_the_work(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("a", "file", "file/out", "link/out", "x" * 256, "new/" + "x" * 256, "/".join(["x" * 200] * 25), "\0"):
        with pytest.raises(UserError, match="Choose another --output_path") as refused:
            check_replaceable(tmp_path / name, False, STAGE, [])
        assert "\n" not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "file", "link"}


@pytest.mark.parametrize("earlier", [None, "old"])
def test_a_mounted_volume_is_filled(mount, earlier):
    volume = mount("volume")
    (volume / "lost+found").mkdir()  # as on a fresh disk
    if earlier:
        fill(volume, "old")
    check_replaceable(volume, bool(earlier), STAGE, [])
    write(volume, overwrite=bool(earlier))
    (volume / "lost+found").rmdir()
    assert content_of(volume) == "new"
    assert hidden(volume) == []


@pytest.mark.parametrize("earlier", [None, "old"])
def test_a_mount_of_the_same_disk_is_filled(mount, tmp_path, earlier):
    """A bind mount has the device number of its parent, so it shows only when it cannot be renamed."""
    (tmp_path / "source").mkdir()
    place = mount("place", "--bind", str(tmp_path / "source"))
    assert not os.path.ismount(place)
    if earlier:
        fill(place, "old")
    write(place, overwrite=bool(earlier))
    assert content_of(tmp_path / "source") == "new"
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV, errno.EACCES])
@pytest.mark.parametrize("earlier", [None, "old"])
def test_a_place_that_cannot_be_renamed_is_filled(tmp_path, monkeypatch, number, earlier):
    out = tmp_path / "out"
    out.mkdir()
    if earlier:
        fill(out, "old")
    rename = os.rename

    def refuse(source, target, **options):
        if Path(source) == out or Path(target) == out:
            raise OSError(number, os.strerror(number))
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", refuse)
    write(out, overwrite=bool(earlier))
    assert content_of(out) == "new"
    assert hidden(tmp_path) == []


def test_a_volume_in_a_read_only_container_is_filled(mount, tmp_path):
    root = mount("root")
    (root / "volume").mkdir()
    mount("root/volume")
    subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
    check_replaceable(root / "volume", False, STAGE, [])
    write(root / "volume")
    assert content_of(root / "volume") == "new"
    with pytest.raises(
        UserError, match=r"cannot be written to \(Read-only file system\). Choose another --output_path"
    ):
        check_replaceable(root / "other", False, STAGE, [])


def test_free_space_is_that_of_the_disk_behind_a_link(tmp_path, monkeypatch):
    (tmp_path / "far").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "far/none/yet")
    asked, usage = [], shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: asked.append(place) or usage)
    check_free_space(tmp_path / "out", 1)
    assert asked == [tmp_path / "far"]


# ---- names


@pytest.mark.parametrize(
    "name", ["[out]", "out *", "?", "-x", "--overwrite", "行 走", "a\nb", "a\udcffb", "x" * 255, "字" * 85, "."]
)
def test_names(tmp_path, monkeypatch, name):
    """Also of what a killed run left, which has a name of its own."""
    monkeypatch.chdir(tmp_path)
    out = Path(name) if name != "." else Path()
    if name == ".":
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
    leftover = output_dir.find_place(out, "--output_path").hidden("incomplete")
    leftover.mkdir()
    (leftover / "weights").write_text("half")
    check_replaceable(out, False, STAGE, [])
    assert not leftover.exists()
    write(out, overwrite=False)
    write(out)
    assert content_of(out.resolve()) == "new"
    assert hidden(tmp_path) == []


def test_a_record_of_names_that_are_not_utf8(tmp_path):
    write_json(tmp_path / "run_config.json", {"output_path": "a\udcffb", "data_path": "数据"})
    assert read_json_object(tmp_path / "run_config.json") == {"output_path": "a\udcffb", "data_path": "数据"}
    assert '"数据"' in (tmp_path / "run_config.json").read_text("utf-8")


def test_the_directory_of_a_live_run_with_a_similar_name_stays(tmp_path):
    with atomic_directory(tmp_path / "out new", False, STAGE) as live:
        fill(live)
        write(tmp_path / "out *", overwrite=False)
        write(tmp_path / "out", overwrite=False)
    assert content_of(tmp_path / "out new") == "new"


# ---- kills


def killed_at(number, action):
    """Run an action in a child process that is killed at its step of this number, if there is one.

    Returns:
        Whether it was killed.
    """
    child = os.fork()
    if not child:
        logger.remove()
        count = itertools.count()
        for name in STEPS:
            original = getattr(os, name)

            def step(*args, original=original, **options):
                if next(count) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **options)

            setattr(os, name, step)
        try:
            action()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.parametrize(
    ("kind", "earlier"),
    [
        ("directory", None),
        ("directory", "old"),
        ("mount point", "empty"),
        ("mount point", "old"),
        ("undetected mount point", "old"),
    ],
)
def test_a_kill_at_any_step_loses_nothing(tmp_path, monkeypatch, kind, earlier):
    rename = os.rename

    def refuse(source, target, **options):
        if out in (Path(source), Path(target)):
            raise OSError(errno.EBUSY, "busy")
        rename(source, target, **options)

    monkeypatch.setattr(os.path, "ismount", lambda path: kind == "mount point" and path == out)
    if kind == "undetected mount point":
        monkeypatch.setattr(os, "rename", refuse)
    seen = set()
    for number in range(200):
        out = tmp_path / str(number) / "out"
        out.mkdir(parents=True) if earlier else out.parent.mkdir()
        if earlier == "old":
            fill(out, "old")
        got_so_far = killed_at(number, functools.partial(write, out, overwrite=earlier == "old"))
        if (out / "config.json").exists() and not (out / ".replacing").exists():
            assert content_of(out) in ("old", "new"), number
        check_replaceable(out, True, STAGE, [])  # clears away what is left, or finishes it
        found = content_of(out) if out.exists() else "nothing"
        assert found in (("old", "new") if earlier == "old" else ("nothing", "new")), number
        assert hidden(out.parent) == []
        write(out, overwrite=True, content="next")
        seen.add(found)
        if not got_so_far:
            break
    assert not got_so_far
    assert found == "new"
    assert len(seen) == 2  # killed before and after the new output was complete


def test_a_kill_while_an_exchange_is_finished_loses_nothing(tmp_path, monkeypatch):
    """A run that is killed when it finishes what a killed run began: the third one finishes it."""
    monkeypatch.setattr(os.path, "ismount", lambda path: path.name == "volume")
    finish = output_dir.finish
    for name in ("out", "volume"):
        for number in range(100):
            out = tmp_path / str(number) / name
            out.mkdir(parents=True)
            fill(out, "old")
            place = output_dir.find_place(out, "--output_path")
            place.hidden("incomplete").mkdir()
            fill(place.hidden("incomplete"))
            monkeypatch.setattr(output_dir, "finish", lambda place: os.kill(os.getpid(), signal.SIGKILL))
            killed_at(None, functools.partial(output_dir.exchange, place))
            monkeypatch.setattr(output_dir, "finish", finish)
            got_so_far = killed_at(number, functools.partial(check_replaceable, out, True, STAGE, []))
            check_replaceable(out, True, STAGE, [])
            assert content_of(out) == "new"
            assert hidden(out.parent) == []
            if not got_so_far:
                break
        assert not got_so_far


def test_an_earlier_output_survives_a_failed_rename(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", os.rename
    write(out, content="old")

    def fail(source, target, **options):
        if Path(source).name == ".out.incomplete":
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(UserError, match=r"out: cannot be written \(Input/output error\)"):
        write(out)
    assert content_of(out) == "old"
    assert hidden(tmp_path) == []


def test_files_of_safetensors_are_readable_as_others_are(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_directory(tmp_path / "out", False, STAGE) as directory:
            save_file({"a": torch.zeros(2)}, directory / "adapter_model.safetensors")
    finally:
        os.umask(old)
    assert (tmp_path / "out/adapter_model.safetensors").stat().st_mode & 0o777 == 0o640


def test_all_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "rename", "replace"):
        original = getattr(os, name)

        def record(first, *args, name=name, original=original, **options):
            path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else first
            order.append((name, Path(path).name))
            return original(first, *args, **options)

        monkeypatch.setattr(os, name, record)
    write(tmp_path / "out")
    assert {name for _, name in order[:4]} == {*FILES, ".out.incomplete"}
    assert order[4:] == [("rename", ".out.incomplete"), ("fsync", tmp_path.name)]
    order.clear()
    with atomic_files(tmp_path / "run", last="config.json") as directory:
        fill(directory)
    assert {step for step, _ in order[:4]} == {"fsync"}
    assert [step for step, _ in order[4:]] == ["replace"] * 3 + ["fsync"]
    assert order[-2] == ("replace", "config.json")


# ---- two runs at once


@pytest.fixture
def no_grace(monkeypatch):
    """Let the second run wait not at all."""
    monkeypatch.setattr(lock_output.__wrapped__, "__defaults__", (0, False))


def test_a_second_run_is_refused_and_the_lock_file_goes_with_the_first(tmp_path, no_grace):
    out, answers = tmp_path / "out", tmp_path / "answers.csv"
    with atomic_directory(out, False, STAGE) as directory:
        fill(directory)
        for second in (lambda: check_replaceable(out, True, STAGE, []), lambda: write(out)):
            with pytest.raises(UserError, match="--output_path .*out is in use by another run"):
                second()
    with (
        lock_answers(answers, False),
        pytest.raises(UserError, match=r"--output_path .*answers.csv is in use"),
        lock_answers(answers, True),
    ):
        pass
    with lock_directory(out, "--output_dir"), pytest.raises(UserError, match="--output_dir .*out is in use"):
        evaluate(type("Job", (), {"output_dir": out}))
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_an_output_written_while_a_run_waited_is_not_replaced(tmp_path):
    out, entered, waiting = tmp_path / "out", threading.Event(), threading.Event()

    def first():
        with atomic_directory(out, False, STAGE) as directory:
            fill(directory)
            entered.set()
            waiting.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(10)
    handler = logger.add(lambda message: "waiting" in message and waiting.set())
    with pytest.raises(UserError, match="not empty. Give another directory, or --overwrite"):
        write(out, overwrite=False, content="second")
    logger.remove(handler)
    thread.join()
    assert content_of(out) == "new"
    (tmp_path / "answers.csv").write_text("")
    with (
        pytest.raises(UserError, match="another run has just written it"),
        lock_answers(tmp_path / "answers.csv", overwrite=False),
    ):
        pass


# ---- full disks


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the quota is used up"),
        (OSError(errno.EFBIG, "File too large"), "a file would become larger"),
        (OSError(errno.EROFS, "Read-only file system"), "the disk is read-only"),
        (OSError("1048576 requested and 666272 written"), "the disk is full"),
        (Exception("No space left on device (os error 28)"), "the disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 192 vs 112"), "the disk is full"),
        (RuntimeError("basic_ios::clear: iostream error"), "the disk is full"),
    ],
)
def test_a_place_that_takes_no_more_is_one_line(tmp_path, error, words):
    def fail():
        with atomic_directory(tmp_path / "out", True, STAGE) as directory:
            fill(directory)
            raise error

    def fail_in_files():
        with atomic_files(tmp_path / "run", last="config.json") as directory:
            fill(directory)
            raise error

    write(tmp_path / "out", content="old")
    for action, name in ((fail, "--output_path"), (fail_in_files, "output_dir")):
        with pytest.raises(UserError, match=f"{words}.*or choose another {name}"):
            action()
    assert content_of(tmp_path / "out") == "old"
    assert hidden(tmp_path) == []


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (FileNotFoundError(2, "No such file"), RuntimeError("shapes differ"), UserError("told already")):
        with pytest.raises(type(error), match=str(error.args[-1])), atomic_directory(tmp_path / "out", False, STAGE):
            raise error
    assert list(tmp_path.iterdir()) == []


def test_libraries_on_a_small_disk(mount):
    """What they raise is told from their texts, which other versions may change."""
    place = mount("small", "-t", "tmpfs", "-o", "size=64k", "tmpfs")
    tensors = {"a": torch.zeros(100_000)}
    vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"token {i}": i for i in range(9000)}, "token 0"))
    for write_file in (
        lambda path: save_file(tensors, path),
        lambda path: torch.save(tensors, path),
        lambda path: np.zeros(1_000_000, np.uint8).tofile(path),
        lambda path: vocabulary.save(str(path)),
        lambda path: path.write_bytes(bytes(100_000)),
    ):
        with (
            pytest.raises(UserError, match=r"out: the disk is full. Free some space, or choose another --output_path"),
            atomic_directory(place / "out", False, STAGE) as directory,
        ):
            write_file(directory / "file")
        assert list(place.iterdir()) == []


def test_a_limit_on_the_size_of_files_shows_before_the_first_tensor(tmp_path):
    with (
        file_size_limit(4096),
        pytest.raises(UserError, match="ulimit -f"),
        atomic_directory(tmp_path / "out", False, STAGE) as directory,
    ):
        ShardWriter(directory, {"a": TensorSpec(torch.float32, (10_000,))})
    assert list(tmp_path.iterdir()) == []


# ---- single files


def test_a_file_behind_a_link_is_written_there(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "answers.jsonl").symlink_to(tmp_path / "disk/far.jsonl")
    path = check_output_path(str(tmp_path / "answers.jsonl"))
    write_output(path, [{"answer": "甲"}], {})
    assert (tmp_path / "answers.jsonl").is_symlink()
    assert (tmp_path / "disk/far.jsonl").read_text("utf-8") == '{"answer": "甲"}\n'
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {"far.jsonl", "far.jsonl.run_config.json"}


def test_files_that_cannot_be_written_are_refused_before_the_work(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, fault in (
        ("pipe.jsonl", "a device, a pipe or a mounted file"),
        ("x" * 249 + ".jsonl", "a name of more than 255 bytes"),
        ("x" * 235 + ".jsonl", "a name of more than 255 bytes"),  # but its run_config.json
    ):
        with pytest.raises(UserError, match=fault):
            check_output_path(str(tmp_path / name))
    for path, fault in (
        ("/dev/null", "a device, a pipe"),
        (str(tmp_path / "x" / "y.json"), "there is no directory"),
    ):
        with pytest.raises(UserError, match=f"--output_json .*{fault}"):
            check_report_path(path)
    assert check_output_file(tmp_path / ("x" * 255), "--output_json") == tmp_path / ("x" * 255)


def test_a_mounted_file_is_refused_before_the_work(mount, tmp_path):
    (tmp_path / "answers.csv").write_text("")
    (mount("disk") / "file").write_text("")
    command = ["mount", "--bind", str(tmp_path / "disk/file"), str(tmp_path / "answers.csv")]
    subprocess.run(command, check=True)
    try:
        with pytest.raises(UserError, match="a mounted file, which cannot be replaced"):
            check_output_path(str(tmp_path / "answers.csv"))
    finally:
        subprocess.run(["umount", str(tmp_path / "answers.csv")], check=True)


def test_partial_answers_do_not_follow_a_link(tmp_path):
    (tmp_path / "private").write_text("mine")
    (tmp_path / "answers.csv.partial.jsonl").symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match=r"answers.csv.partial.jsonl: a link. Delete it"):
        PartialAnswers(tmp_path / "answers.csv", {}, resume=False)
    assert (tmp_path / "private").read_text() == "mine"


def test_an_evaluation_that_was_killed_at_its_end_can_be_repeated(tmp_path):
    (tmp_path / "report.html").write_text("")
    with pytest.raises(UserError, match=r"not empty, and no run_config.json in it says"):
        check_output_dir(tmp_path, ())
    disk.hidden_sibling(tmp_path / "run_config.json", "incomplete").mkdir()
    check_output_dir(tmp_path, ())


def test_a_report_is_complete_or_the_earlier_one(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("earlier")
    with file_size_limit(100), pytest.raises(UserError, match=r"ulimit -f.*another --output_json"):
        write_report({"models": [{"label": "a", "weight_format": "fp16"}]}, path)
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_writing_is_tried_and_leaves_nothing(tmp_path, monkeypatch):
    check_writable(tmp_path / "new/dir", "--output_dir")
    assert list(tmp_path.iterdir()) == []

    def fail(dir):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", fail)  # os.access says yes to root
    with pytest.raises(UserError, match=r"--output_dir cannot be written to \(Read-only file system\)"):
        check_writable(tmp_path, "--output_dir")


def test_what_a_killed_run_left_of_files_goes(tmp_path):
    leftover = disk.hidden_sibling(tmp_path / "config.json", "incomplete")
    leftover.mkdir()
    (leftover / "half").write_text("")
    (tmp_path / "far").symlink_to(tmp_path / "disk/run")  # nothing there yet
    for directory in (tmp_path, tmp_path / "far"):
        with atomic_files(directory, last="config.json") as temporary_dir:
            fill(temporary_dir)
        assert (directory / "config.json").is_file()
    assert hidden(tmp_path) == []


# ---- caches that cannot be written


@pytest.fixture
def loader(monkeypatch):
    """Transformers' loader for remote code, put back afterwards as it was."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", "/dev/null/modules")
    monkeypatch.setenv("HF_MODULES_CACHE", "/dev/null/modules")
    for name in remote_code.OTHER_CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/dev/null")
    for function in (remote_code.private_dir, remote_code.move_other_caches):
        function.cache_clear()
    yield
    for function in (remote_code.private_dir, remote_code.move_other_caches):
        function.cache_clear()


def test_model_code_is_loaded_without_a_home(loader, log_lines):
    for family in FAMILIES:
        model_class = remote_code.remote_code("modeling_chatglm.ChatGLMForConditionalGeneration", family.remote_dir)
        assert model_class.config_class.__name__ == "ChatGLMConfig"
    place = Path(os.environ["HF_MODULES_CACHE"]).parent
    assert place.stat().st_mode & 0o777 == 0o700
    assert [line for line in log_lines if "private temporary directory" in line] == log_lines[:1]
    assert all(Path(os.environ[name]).parent == place for name in remote_code.OTHER_CACHES)


def test_without_any_place_for_model_code(loader, monkeypatch):
    def fail(prefix):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.mkdtemp", fail)
    with pytest.raises(UserError, match="Set HF_MODULES_CACHE or TMPDIR to a directory that can be written to"):
        remote_code.remote_code("quantization.quantize_rows", FAMILIES[0].remote_dir)


@pytest.mark.slow
def test_a_chat_without_a_home_leaves_no_directory(tmp_path):
    environment = {**os.environ, "HOME": "/dev/null", "TMPDIR": str(tmp_path)}
    for name in ("HF_MODULES_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    command = [sys.executable, "chat_demo.py", "--model_path", "models/chatglm2-tiny", "--prompt", "你好"]
    done = subprocess.run(command, cwd=PROJECT_DIR, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "private temporary directory" in done.stderr
    assert list(tmp_path.iterdir()) == []
