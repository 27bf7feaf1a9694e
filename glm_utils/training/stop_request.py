"""A signal stops a training: a checkpoint at the next step, the command that goes on, exit code 75 or, Ctrl-C, 130."""

import contextlib
import functools
import multiprocessing
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, NoReturn

import torch
from loguru import logger
from torch import distributed
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from glm_utils.signals import ignore_signals, say, signal_name, take_signals

SAVED_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later
INTERRUPTED_CODE = 128 + signal.SIGINT
RESUME_FLAG = re.compile(r"--?(no)?resume[-_]from[-_]checkpoint(=(?P<value>.*))?", re.DOTALL)


class Stopped(Exception):
    """The checkpoint of a run that is to stop is saved."""


class StopRequest(TrainerCallback):
    """Save a checkpoint when a signal asks for it, and then end the training.

    Several processes agree on the step: each contributes the signal that it received to an all-reduce on the CPU, and
    its result is read one step later, so that no step waits for it. A single process only looks at a number.

    Attributes:
        signum: The signal of this process; 0: none yet.
        agreed: The signal that all processes know of; 0: none yet.
    """

    def __init__(self) -> None:
        self.signum = self.agreed = 0
        self.is_finishing = False
        self.group: distributed.ProcessGroup | None = None
        self.pending: tuple[torch.Tensor, distributed.Work] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Take the signals over."""
        self.first_step, self.is_first_process = state.global_step, state.is_world_process_zero
        if args.world_size > 1 and self.group is None:
            self.group = distributed.new_group(backend="gloo")  # of its own, on the CPU: it never waits for a GPU
        take_signals(self.receive)

    def receive(self, signum: int) -> None:
        """Note the signal, and say what follows."""
        self.signum = signum
        if self.is_first_process:
            then = "the last step is done, so the run is finished" if self.is_finishing else "saving a checkpoint"
            say(f"\n{signal_name(signum)}: {then}; a second signal leaves at once")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Ask for a checkpoint if a signal arrived; the last step needs none, as the run is finished anyway."""
        self.is_finishing = state.global_step >= state.max_steps
        if self.group is None:
            self.agreed = self.signum
        else:
            self._read_pending()
            self.pending = self._start_agreeing()
        if self.agreed and not self.is_finishing:
            self._request_checkpoint(args, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Ask for a checkpoint after an evaluation, without another step."""
        if not self.is_finishing and state.global_step > self.first_step and self._agree_now():
            self._request_checkpoint(args, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """End the training behind a checkpoint.

        Raises:
            Stopped: A signal arrived. The Trainer's own way out would load the best model and delete checkpoints.
        """
        if not self.is_finishing and self._agree_now() and not args.save_only_model:
            raise Stopped

    def _request_checkpoint(self, args: TrainingArguments, control: TrainerControl) -> None:
        control.should_save = True
        args.save_only_model = False  # such a checkpoint cannot be resumed

    def _start_agreeing(self) -> tuple[torch.Tensor, distributed.Work]:
        """Start to find the largest signal of all processes."""
        found = torch.tensor([self.signum])
        return found, distributed.all_reduce(found, distributed.ReduceOp.MAX, self.group, async_op=True)

    def _read_pending(self) -> None:
        """Read what was started at the step before."""
        if self.pending:
            found, work = self.pending
            work.wait()
            self.agreed = max(self.agreed, int(found))
            self.pending = None

    def _agree_now(self) -> int:
        """Return the signal that all processes know of at this moment; 0: none."""
        if self.group is None:
            self.agreed = self.signum
        else:
            self._read_pending()
            self.pending = self._start_agreeing()
            self._read_pending()
        return self.agreed

    def release(self) -> None:
        """Let go of the process group, once what was started in it is done."""
        self._read_pending()
        self.group = None

    def leave(self, trainer: Trainer) -> NoReturn:
        """Say where the checkpoint is and how to go on, and end the process.

        Args:
            trainer: Its training was stopped; what holds the process group is gone with it.

        Raises:
            SystemExit: Always: 75, or 130 after Ctrl-C.
        """
        ignore_signals()  # torchrun sends one to the other processes when the first one has left
        state = trainer.state
        trainer.callback_handler.on_train_end(trainer.args, state, trainer.control)  # closes the bar and TensorBoard
        if self.is_first_process:
            checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{state.global_step}"
            name = signal_name(self.agreed)
            logger.warning(
                f"{name}: stopped at step {state.global_step}/{state.max_steps}, saved {checkpoint}. Go on with:"
            )
            sys.stderr.write(resume_command(command_line()) + "\n")
            sys.stderr.flush()
        if self.group is not None:
            distributed.barrier(self.group)  # nobody leaves before the first process has said it
        trainer.end_processes()
        raise SystemExit(INTERRUPTED_CODE if self.agreed == signal.SIGINT else SAVED_CODE)


def command_line() -> list[str]:
    """Return the command line as it was given; torchrun's if that started this process."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
            is_script = len(words) > 1 and Path(words[1]).name == "torchrun"  # python .../bin/torchrun ...
            return words[1:] if is_script else words
    return sys.orig_argv


def resume_command(words: Sequence[str]) -> str:
    """Return a command line that goes on from the newest checkpoint, quoted for a shell.

    Args:
        words: The command line that started the run.
    """
    kept, value, skips = [], "latest", False
    for word in words:
        if match := RESUME_FLAG.fullmatch(word):
            skips = match["value"] is None
            given = match["value"]
        elif skips and not word.startswith("-"):
            skips, given = False, word
        else:
            skips, given = False, None
            kept.append(word)
        value = "auto" if given == "auto" else value
    return shlex.join([*kept, "--resume_from_checkpoint", value])


def with_lasting_workers(loader: DataLoader) -> DataLoader:
    """Return a data loader whose workers live on when a signal reaches the whole process group.

    PyTorch lets a worker exit at the SIGTERM of its parent and die of any other one, which fails the training.
    """
    if loader.num_workers:
        is_over = multiprocessing.RawValue("b", 0)
        # Of this priority it runs before multiprocessing terminates and joins the workers, also in a process that
        # multiprocessing started, where functions of atexit run later or not at all.
        Finalize(None, setattr, args=(is_over, "value", 1), exitpriority=10)
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper starts the workers of this one
        inner.worker_init_fn = functools.partial(outlive_signals, is_over, inner.worker_init_fn)
    return loader


def outlive_signals(is_over: Any, worker_init: Callable[[int], None] | None, worker_id: int) -> None:
    """Let a data loader's worker ignore signals until its parent exits.

    Args:
        is_over: Shared number; not 0: the parent exits.
        worker_init: The loader's own function for new workers.
        worker_id: See torch.utils.data.DataLoader.
    """
    for signum in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if is_over.value else None)
    if worker_init is not None:
        worker_init(worker_id)
