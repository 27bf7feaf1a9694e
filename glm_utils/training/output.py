"""The output directory of a run: chosen start, one run at a time, and errors of its disk in one line."""

import contextlib
from collections.abc import Iterator

from accelerate.utils import broadcast_object_list

from glm_utils.cli import UserError
from glm_utils.disk import write_fault
from glm_utils.files import check_writable
from glm_utils.output_lock import lock_output
from glm_utils.training.checkpoints import list_checkpoints, remove_leftovers
from glm_utils.training.manifest import checkpoint_fault
from glm_utils.training.resume import Start, choose_start
from glm_utils.training.settings import TrainingSettings


@contextlib.contextmanager
def claim_output(settings: TrainingSettings, dry_run: bool) -> Iterator[Start]:
    """Choose where the run starts, and keep other runs out of its output directory while the block runs.

    The first process decides; the others get what it chose, or are ended by torchrun when it is refused.

    Args:
        settings: The run's settings.
        dry_run: Whether nothing is written, so that no lock is needed.

    Raises:
        UserError: The start is refused, another run is at work there, or the directory cannot be written to, now or
            while the block runs.
    """
    with contextlib.ExitStack() as stack:
        start = Start()
        if settings.training_args.process_index == 0:
            check_writable(settings.output_dir, "output_dir")
            start = choose_start(settings)  # refused before anything is created
            if not dry_run:
                what = f"output_dir {settings.output_dir}"
                stack.enter_context(lock_output(settings.output_dir / ".lock", what, remove=True))
                remove_leftovers(settings.output_dir)
                start = choose_start(settings)  # a run that was waited for may have written more
            start.log()
        if settings.training_args.world_size > 1:
            (start,) = broadcast_object_list([start])
        stack.enter_context(disk_errors_explained(settings))
        yield start


@contextlib.contextmanager
def disk_errors_explained(settings: TrainingSettings) -> Iterator[None]:
    """Turn errors of writing to the output directory, whichever library raises them, into one line.

    Raises:
        UserError: The disk takes no more, or a file in the directory cannot be written.
    """
    output_dir = settings.output_dir
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        fault = write_fault(error)
        name = getattr(error, "filename", None)
        if fault is None and isinstance(error, OSError) and str(name).startswith(str(output_dir)):
            fault = f"{name} cannot be written ({error.strerror})"
        if fault is None:
            raise
        complete = [path.name for path in list_checkpoints(output_dir) if not checkpoint_fault(path)]
        remedy = "the same command starts again"
        if complete:
            remedy = f"--resume_from_checkpoint latest goes on from {complete[-1]}, which is complete"
        raise UserError(f"output_dir {output_dir}: {fault}. Make room or mend it; then {remedy}") from error
