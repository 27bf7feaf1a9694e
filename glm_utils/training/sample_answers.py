"""Answers to a few evaluation examples, written to TensorBoard's text tab at each evaluation."""

import html
import re

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from glm_utils.cli import UserError
from glm_utils.encoding import IGNORED_LABEL, EncodedExamples

MAX_ANSWER_TOKENS = 128  # per answer: 6B weights in 4 bit take about 5 s
MARKDOWN = re.compile(r"([\\`*_{}\[\]()>#+\-.!|~])")
CONTROL_CHARACTERS = re.compile(r"[^\S \n]|[\x00-\x08\x0e-\x1f\x7f-\x9f]")


def check_log_samples(num_samples: int, has_eval: bool, training_args: TrainingArguments) -> None:
    """Check --log_samples.

    Args:
        num_samples: Its value.
        has_eval: Whether there is evaluation data.
        training_args: Their report_to has to name tensorboard.

    Raises:
        UserError: A negative number, no evaluation data, or no TensorBoard.
    """
    if num_samples < 0:
        raise UserError(f"--log_samples={num_samples}: expected 0 or more")
    if num_samples and not has_eval:
        raise UserError(
            f"--log_samples={num_samples} answers evaluation examples. Give --eval_data_path or --eval_ratio"
        )
    if num_samples and "tensorboard" not in training_args.report_to:
        raise UserError(
            f"--log_samples={num_samples} writes to TensorBoard, and report_to of the JSON file is "
            f'{training_args.report_to or "none"}. Set it to "tensorboard"'
        )


def as_markdown(text: str) -> str:
    """Return Markdown that shows a text as it is, line by line; control characters become spaces."""
    escaped = MARKDOWN.sub(r"\\\1", html.escape(CONTROL_CHARACTERS.sub(" ", text), quote=False))
    return escaped.strip().replace("\n", "  \n") or "(empty)"


class SampleAnswers(TrainerCallback):
    """Write prompt, expected and generated answer of the first evaluation examples to TensorBoard.

    Answers are greedy: they draw no random numbers, so that a run is the same with and without them.

    Args:
        trainer: The Trainer, for its model, number format and tokenizer.
        encoded: The evaluation examples.
        num_samples: How many of them are answered.
    """

    def __init__(self, trainer: Trainer, encoded: EncodedExamples, num_samples: int):
        self.trainer, self.decode = trainer, trainer.processing_class.decode
        self.samples = []
        for example in map(encoded.dataset.__getitem__, range(min(num_samples, len(encoded.dataset)))):
            ids, num_prompt = example["input_ids"], example["labels"].count(IGNORED_LABEL)
            self.samples.append((ids[:num_prompt], ids[num_prompt:]))

    def on_evaluate(self, args: TrainingArguments, state, control, **kwargs) -> None:
        """Write the answers of the model as it is now."""
        if not state.is_world_process_zero:
            return
        callbacks = self.trainer.callback_handler.callbacks
        writer = next(callback for callback in callbacks if isinstance(callback, TensorBoardCallback)).tb_writer
        for number, (prompt_ids, answer_ids) in enumerate(self.samples, start=1):
            texts = {"prompt": self.decode(prompt_ids), "expected": self.decode(answer_ids)}
            texts["generated"] = self.decode(self.generate(prompt_ids))
            blocks = [f"**{name}**\n\n{as_markdown(text)}" for name, text in texts.items()]
            writer.add_text(f"sample answers/{number}", "\n\n".join(blocks), state.global_step)
        writer.flush()

    def generate(self, prompt_ids: list[int]) -> list[int]:
        """Return the ids of the model's greedy answer to a prompt, at most MAX_ANSWER_TOKENS."""
        model = self.trainer.model
        was_training, ids = model.training, torch.tensor([prompt_ids], device=model.device)
        model.eval()
        try:
            with self.trainer.compute_loss_context_manager():
                # a captured graph would keep memory that the next training step needs
                *_, ids = model.get_base_model().stream_generate(
                    ids, do_sample=False, max_new_tokens=MAX_ANSWER_TOKENS, use_cuda_graph=False
                )
        finally:
            model.train(was_training)
        return ids[0, len(prompt_ids) :].tolist()
