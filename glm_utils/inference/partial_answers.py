"""The answers of a job so far: each goes to a file as it comes, and a run that was stopped goes on from there."""

from __future__ import annotations  # batch.py imports torch

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from loguru import logger

from glm_utils.cli import UserError
from glm_utils.disk import write_fault

if TYPE_CHECKING:
    from glm_utils.inference.batch import Answer

SYNC_SECONDS = 5  # between two waits for the disk
PARTIAL_ENDING = ".partial.jsonl"  # after the name of the output


class PartialAnswers:
    """The answers of a job so far, in OUTPUT.partial.jsonl: one line that identifies the job, then one per answer.

    A context manager; what is there stays there when the job is stopped.

    Args:
        output_path: The job's output.
        identity: What the answers depend on, by name.
        resume: Go on with what an earlier run left; False: begin anew.

    Attributes:
        path: Of the partial file.
        answers: By prompt and sample; as in the file.

    Raises:
        UserError: What an earlier run left belongs to another job, or is a link.
    """

    def __init__(self, output_path: Path, identity: dict, resume: bool):
        self.path = output_path.with_name(f"{output_path.name}{PARTIAL_ENDING}")
        self.identity = json.loads(json.dumps(identity))
        self.answers: dict[tuple[int, int], dict] = {}
        self.synced_at = time.monotonic()
        if self.path.is_symlink():  # somebody else's, who would have another file overwritten
            raise UserError(f"{self.path}: a link. Delete it, or choose another --output_path")
        num_bytes = self._read() if resume and self.path.exists() else 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("r+b" if num_bytes else "wb")
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}). Choose another --output_path"
            ) from error
        self.file.truncate(num_bytes)  # a line that a killed run wrote in part
        self.file.seek(num_bytes)
        if not num_bytes:
            self._write({"job": self.identity})

    def __enter__(self) -> PartialAnswers:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def _read(self) -> int:
        """Read what an earlier run left; return the length of its complete lines in bytes."""
        num_bytes = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                value = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                value = None
            if not isinstance(value, dict):
                break
            if not num_bytes:
                self._check_identity(value.get("job"))
            elif {"index", "sample", "answer", "num_tokens", "ended_by"} <= value.keys():
                self.answers[value["index"], value["sample"]] = value
            num_bytes += len(line)
        if num_bytes:
            logger.info(f"{self.path}: {len(self.answers)} answers of an earlier run")
        return num_bytes

    def _check_identity(self, other: object) -> None:
        other = other if isinstance(other, dict) else {}
        differing = [key for key, value in self.identity.items() if other.get(key) != value]
        if differing:
            found = ", ".join(f"{key} {other.get(key)!r}, now {self.identity[key]!r}" for key in differing)
            raise UserError(
                f"{self.path}: of another job ({found}). Repeat that job, give another --output_path, or --resume "
                "false to begin anew"
            )

    def add(self, answer: Answer) -> None:
        """Note a finished answer.

        Raises:
            UserError: The disk is full.
        """
        value = {
            "index": answer.index,
            "sample": answer.sample,
            "answer": answer.text,
            "num_tokens": answer.num_tokens,
            "ended_by": "end" if answer.ended else "length",
        }
        self._write(value)
        self.answers[answer.index, answer.sample] = value

    def _write(self, value: dict) -> None:
        try:
            self.file.write(json_line(value))
            self.file.flush()
            if time.monotonic() - self.synced_at > SYNC_SECONDS:
                os.fsync(self.file.fileno())
                self.synced_at = time.monotonic()
        except OSError as error:
            fault = write_fault(error)
            if fault is None:
                raise
            raise UserError(f"{self.path}: {fault}. Free some space; the same command then goes on") from error

    def remove(self) -> None:
        """Delete the file, once the output is there."""
        self.path.unlink()


def json_line(value: dict) -> bytes:
    """Return a line of JSON; halves of surrogate pairs, which UTF-8 does not have, are spelled out."""
    try:
        return (json.dumps(value, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(value) + "\n").encode()
