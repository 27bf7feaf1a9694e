"""Transformers' Trainer with this project's batches and memory plan."""

import contextlib
import copy
import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import peft
import torch
from accelerate import PartialState
from transformers import PrinterCallback, ProgressCallback, Trainer

from glm_utils.encoding import EncodedExamples
from glm_utils.files import write_json
from glm_utils.training.best_step import Patience, best_checkpoint, kept_step
from glm_utils.training.checkpoints import hidden_dir, make_hidden_dir, publish_checkpoint, rotate_checkpoints
from glm_utils.training.memory_plan import MemoryPlan
from glm_utils.training.preflight import memory_advice, memory_explained
from glm_utils.training.run_log import QuietProgress, RunCallback, check_trained_weights
from glm_utils.training.sample_answers import SampleAnswers
from glm_utils.training.sampling import LengthGroups, choose_sampler
from glm_utils.training.settings import TrainingSettings
from glm_utils.training.stop_request import Stopped, StopRequest, with_lasting_workers
from glm_utils.training.streamed import UnusableReport


class LoraTrainer(Trainer):
    """Run each batch under the memory plan; count tokens, average evaluation losses over tokens, save atomically.

    For packed batches neither of the counts waits for the GPU.

    Attributes:
        plan: The memory plan, set by make_trainer.
        run_log: Logs the run and measures its speed, set by make_trainer.
        all_metrics: The metrics of all splits so far.
        save_limit: Checkpoints that stay; None: all. The Trainer's own rotation is off.
        saving_dir: Where the Trainer makes the directory checkpoint-N while it saves; None: in output_dir.
        patience: Stops a run that no longer improves, set by make_trainer.
        stop_request: Saves a checkpoint and ends the run when a signal arrives, set by make_trainer.
        eval_sums: Summed loss and number of trained tokens of an evaluation, in this process.
    """

    plan: MemoryPlan
    run_log: RunCallback
    all_metrics: Mapping = MappingProxyType({})
    save_limit: int | None = None
    saving_dir: Path | None = None
    patience: Patience
    stop_request: StopRequest
    eval_sums: torch.Tensor

    def _get_train_sampler(self, train_dataset=None):
        """Return the sampler that orders the examples."""
        grouped = self.args.train_sampling_strategy == "group_by_length"
        return LengthGroups(self) if grouped else choose_sampler(self, super()._get_train_sampler(train_dataset))

    def _get_dataloader(self, *args, **kwargs):
        """Build a data loader."""
        return with_lasting_workers(super()._get_dataloader(*args, **kwargs))

    def train(self, *args, **kwargs):
        """Train; a run that a signal stops ends the process here, after its checkpoint.

        Raises:
            SystemExit: The run was stopped.
        """
        with contextlib.suppress(Stopped):
            return super().train(*args, **kwargs)
        self.stop_request.leave(self)  # the frames that hold the process group are gone by now

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Run the forward and backward pass of one batch.

        Raises:
            UserError: The device runs out of memory.
        """
        num_tokens = inputs["input_ids"].numel()
        if self.args.include_num_input_tokens_seen == "no":  # otherwise the Trainer counts
            num_real = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else num_tokens
            self.state.num_input_tokens_seen += num_real * self.args.world_size  # ranks have similar batches
        advice = functools.partial(memory_advice, self.args)
        explained: contextlib.AbstractContextManager = contextlib.nullcontext()
        if not self.args.auto_find_batch_size:  # with it the Trainer catches the error and tries smaller batches
            explained = memory_explained(f"step {self.state.global_step + 1}", num_tokens, advice)
        with explained, self.plan.applied(num_tokens):
            return super().training_step(model, inputs, num_items_in_batch)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """Log, evaluate and save if that is due, but not with weights that are NaN."""
        if self.control.should_log or self.control.should_save:
            check_trained_weights(self.args, self.state, self.model)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        """Run an epoch, unless all steps are done: of a run that was killed behind its last step, only the end is due.

        The Trainer would take one more step.
        """
        if self.state.global_step >= self.state.max_steps or self.patience.is_over(self.state):
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial):
        """Return the directory in which checkpoint-N is made: a hidden one during a save."""
        return str(self.saving_dir) if self.saving_dir else super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        """Save into a hidden directory, which the first process renames when every process has written its part.

        In transformers 5.17 to 5.23 the Trainer asks _get_output_dir where to, and rotates there. It takes the best
        checkpoint's path from there too, so the state is written again with the final one.
        """
        output_dir, step, is_first = Path(self.args.output_dir), self.state.global_step, self.is_world_process_zero()
        if is_first:
            make_hidden_dir(output_dir, step)
        best_dir, best_before = best_checkpoint(self.state, output_dir), self.state.best_model_checkpoint
        self.accelerator.wait_for_everyone()
        try:
            self.saving_dir = hidden_dir(output_dir, step)
            super()._save_checkpoint(model, trial)
            self.state.best_model_checkpoint = best_dir or best_before
            self.accelerator.wait_for_everyone()
            if is_first:
                self.state.save_to_json(str(self.saving_dir / f"checkpoint-{step}" / "trainer_state.json"))
                publish_checkpoint(output_dir, step)
                rotate_checkpoints(output_dir, self.save_limit, step, self.state.best_model_checkpoint)
        except BaseException:
            if is_first:
                shutil.rmtree(hidden_dir(output_dir, step), ignore_errors=True)
            raise
        finally:
            self.saving_dir = None
        self.accelerator.wait_for_everyone()

    def _determine_best_metric(self, metrics, trial):
        """Note the best evaluation, and give it a checkpoint, so that it is what is kept."""
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return is_best

    @property
    def kept_step(self) -> int:
        """The step after which the weights were as they are at the end: the last one, or the best checkpoint's."""
        return kept_step(self.args, self.state)

    def save_metrics(self, split, metrics, combined=True):
        """Write metrics to <split>_results.json, and those of all splits of this process to all_results.json."""
        self.all_metrics = {**self.all_metrics, **metrics}
        if self.is_world_process_zero():
            for name, values in ((split, metrics), ("all", self.all_metrics)):
                write_json(Path(self.args.output_dir) / f"{name}_results.json", dict(sorted(values.items())))

    def save_state(self):
        """Write trainer_state.json."""
        if self.is_world_process_zero():
            write_json(Path(self.args.output_dir) / "trainer_state.json", dataclasses.asdict(self.state))

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """Evaluate, and report the loss as the mean over all trained tokens, independent of the batches.

        On several GPUs the examples that fill up the last batches count twice.
        """
        self.eval_sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss_sum, num_tokens = self.accelerator.reduce(self.eval_sums).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss_sum / num_tokens
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return the mean loss of one batch, and add its sum to the evaluation's.

        Raises:
            UserError: The device runs out of memory.
        """
        inputs = self._prepare_inputs(inputs)
        num_tokens = inputs["loss_positions"].numel()
        advice = f"Halve per_device_eval_batch_size (now {self.args.per_device_eval_batch_size})"
        explained = memory_explained("the evaluation", inputs["input_ids"].numel(), lambda: advice)
        with explained, torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**inputs).loss
        self.eval_sums[0] += loss * num_tokens
        self.eval_sums[1] += num_tokens
        return loss, None, None

    def end_processes(self) -> None:
        """Leave the process group; with a single process nothing happens.

        The group's threads end with its last reference, which the DDP wrapper holds. A thread that outlives the
        interpreter aborts the process, and torchrun then stops the others, perhaps before the adapter is written.
        """
        self.stop_request.release()
        self.model_wrapped = None
        self.accelerator.free_memory()
        leave_process_group()


def leave_process_group() -> None:
    """Destroy the process group, if there is one."""
    PartialState().destroy_process_group()


def make_trainer(
    settings: TrainingSettings,
    model: peft.PeftModel,
    plan: MemoryPlan,
    encoded: dict[str, EncodedExamples],
    begin: Callable[[], None],
) -> LoraTrainer:
    """Build the Trainer.

    Args:
        settings: The run's settings.
        model: The LoRA model.
        plan: Its memory plan.
        encoded: Encoded examples under "train" and, optionally, "eval".
        begin: See RunCallback.
    """
    args = copy.copy(settings.training_args)
    args.save_total_limit = None  # the Trainer would also delete checkpoints of other programs, and the last one
    trainer = LoraTrainer(
        model=model,
        args=args,
        train_dataset=encoded["train"].dataset,
        eval_dataset=encoded["eval"].dataset if "eval" in encoded else None,
        data_collator=settings.collator,
        processing_class=settings.base.tokenizer,
    )
    trainer.plan, trainer.save_limit = plan, settings.training_args.save_total_limit
    trainer.remove_callback(PrinterCallback if trainer.args.disable_tqdm else ProgressCallback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(QuietProgress())
    trainer.run_log = RunCallback(begin)
    trainer.add_callback(trainer.run_log)
    if settings.num_log_samples:
        trainer.add_callback(SampleAnswers(trainer, encoded["eval"], settings.num_log_samples))
    trainer.add_callback(UnusableReport(trainer.train_dataset, trainer.eval_dataset))
    trainer.patience = Patience(settings.arguments["early_stopping_patience"])
    trainer.add_callback(trainer.patience)
    trainer.stop_request = StopRequest()
    trainer.add_callback(trainer.stop_request)  # the last one: what others do behind a checkpoint is done by then
    return trainer
