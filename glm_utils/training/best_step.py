"""The best step of a run by eval_loss: it is kept with load_best_model_at_end, and others may follow in vain."""

import math
from pathlib import Path

from loguru import logger
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from glm_utils.files import peek_json_object
from glm_utils.training.checkpoints import step_of


def waited_since_best(log_history: list[dict]) -> tuple[int, int]:
    """Return how many evaluations the best one lies back, and its step; (0, 0) without evaluations.

    Computed from the history, which every checkpoint holds, so that a resumed run stops where the whole one does. An
    evaluation before the first step does not count, and one made again after resuming counts once.
    """
    entries = [(entry.get("step"), entry.get("eval_loss")) for entry in log_history if isinstance(entry, dict)]
    losses = {step: loss for step, loss in entries if step and isinstance(step, int) and isinstance(loss, float)}
    best_loss, best_step, waited = math.inf, 0, 0
    for step in sorted(losses):
        is_better = losses[step] < best_loss
        waited = 0 if is_better else waited + 1
        if is_better:
            best_loss, best_step = losses[step], step
    return waited, best_step


def has_stopped_early(directory: Path, patience: int | None) -> bool:
    """Return whether the run that wrote a checkpoint or an output directory waited in vain.

    Args:
        directory: Its trainer_state.json is read.
        patience: Evaluations without a better one after which a run stops; None: it does not.
    """
    history = peek_json_object(directory / "trainer_state.json").get("log_history")
    return patience is not None and isinstance(history, list) and waited_since_best(history)[0] >= patience


class Patience(TrainerCallback):
    """Stop a run behind a checkpoint when eval_loss has not improved for some evaluations.

    Args:
        patience: So many evaluations; None: never.
    """

    def __init__(self, patience: int | None):
        self.patience = patience

    def is_over(self, state: TrainerState) -> bool:
        """Return whether the run has waited in vain."""
        return self.patience is not None and waited_since_best(state.log_history)[0] >= self.patience

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Stop the run if the last evaluations were no better than one before them."""
        if not self.is_over(state) or not state.global_step or control.should_training_stop:  # ends anyway
            return
        control.should_training_stop = True
        control.should_save = args.save_strategy != "no"  # from which it goes on with more patience
        if state.is_world_process_zero:
            waited, best_step = waited_since_best(state.log_history)
            logger.info(f"stopping at step {state.global_step}: {waited} evaluations no better than step {best_step}")


def best_checkpoint(state: TrainerState, output_dir: Path) -> str | None:
    """Return the path of the best checkpoint in output_dir, also if it is the one that is due; None: no such."""
    best = state.best_global_step
    path = output_dir / f"checkpoint-{best}"
    return str(path) if best and (best == state.global_step or path.is_dir()) else None


def find_best_again(args: TrainingArguments, state: TrainerState) -> None:
    """Find the best checkpoint of a resumed run, whose output directory may have been moved.

    If it is gone, the best one of what follows is kept.
    """
    if state.best_model_checkpoint is not None or not state.best_global_step:
        return
    path = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
    if path.is_dir():
        state.best_model_checkpoint = str(path)
    elif args.load_best_model_at_end:
        if state.is_world_process_zero:
            logger.warning(
                f"{path}, the best checkpoint so far, is gone: the best one of those that follow will be kept"
            )
        state.best_metric = state.best_global_step = None


def kept_step(args: TrainingArguments, state: TrainerState) -> int:
    """Return the step whose weights a run ends with: the last one, or the best checkpoint's."""
    is_best = args.load_best_model_at_end and state.best_model_checkpoint is not None
    return step_of(Path(state.best_model_checkpoint)) if is_best else state.global_step
