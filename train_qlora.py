"""Train a LoRA adapter on ChatGLM-6B or ChatGLM2-6B in 4 bit: instruction data + base model -> adapter directory.

    python train_qlora.py --model_name_or_path THUDM/chatglm2-6b --train_args_json chatGLM2_6B_QLoRA.json \
        --train_data_path data/train.jsonl --eval_data_path data/dev.jsonl

Without a GPU or a network: --model_name_or_path models/chatglm2-tiny. The output directory (output_dir of the JSON
file) gets the adapter, its tokenizer files, checkpoints, TensorBoard logs in runs/, results, loss curves,
run_config.json and a model card.
"""

import functools
from typing import TYPE_CHECKING, Literal

from loguru import logger

from glm_utils.cli import run_cli
from glm_utils.hub import Hub
from glm_utils.signals import note_if_interrupted, release_signals
from glm_utils.training.argument_keys import JSON_ONLY
from glm_utils.training.inputs import read_inputs

if TYPE_CHECKING:
    from glm_utils.training.settings import TrainingSettings


def train_qlora(
    *,
    train_args_json: str | None = None,
    model_name_or_path: str | None = None,
    hub: Hub = "huggingface",
    init_lora_path: str | None = None,
    train_data_path: str | None = None,
    eval_data_path: str | None = None,
    eval_ratio: float | None = None,
    prompt_column: str | None = None,
    response_column: str | None = None,
    history_column: str | None = None,
    sheet: str | None = None,
    seed: int | None = None,
    max_input_length: int = 512,
    max_output_length: int = 1536,
    truncated_answers: Literal["cut_and_end", "cut", "drop"] = "cut_and_end",
    loss_on: Literal["all", "last"] = "last",
    lora_rank: int | None = None,
    lora_alpha: int | None = None,
    lora_dropout: float | None = None,
    resume_from_checkpoint: str | bool | None = None,
    prompt_text: str | None = None,
    compute_dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto",
    lora_targets: str | list[str] | None = None,
    packing: bool = True,
    early_stopping_patience: int | None = None,
    log_samples: int = 0,
    dry_run: bool = False,
    output_json: str | None = None,
    evaluate_after: bool = False,
) -> None:
    """Train a LoRA adapter on a 4-bit ChatGLM base model.

    Args:
        train_args_json: JSON file of TrainingArguments, today's keys or those of 2023. Default: the one of the family.
        model_name_or_path: Directory of the base model, or its hub id. Default: that of init_lora_path, else
            THUDM/chatglm2-6b.
        hub: Hub that a model is downloaded from: huggingface, or modelscope (pip install '.[modelscope]').
        init_lora_path: Adapter to go on from with new data, an output_dir or a checkpoint-N: its weights, rank, alpha,
            targets, prompt_text and base, a new optimizer and schedule. Default: new LoRA weights.
        train_data_path: JSON, CSV or XLSX files of training examples, several or globs joined by commas, perhaps with
            shares of a mixture: a.jsonl:0.8,b.jsonl:0.2. Default: the project's sample, data/train.jsonl.
        eval_data_path: Files of evaluation examples. Default: data/dev.jsonl with the sample, else no evaluation.
        eval_ratio: Part of the training examples that is held out for evaluation instead, e.g. 0.05.
        prompt_column: Key or column of the question. Default: by the form of the file.
        response_column: Key or column of the answer, likewise.
        history_column: Key or column of the earlier turns, likewise.
        sheet: Sheet of an XLSX file that holds several.
        seed: Seed of LoRA weights, data order and dropout. Default: the JSON file's, else 42.
        max_input_length: Longest prompt in tokens; a longer one loses its oldest turns, then the end of the question.
        max_output_length: Longest answer in tokens; truncated_answers says what becomes of a longer one.
        truncated_answers: cut_and_end truncates and trains the end token behind the cut; cut truncates and trains no
            end token, so that the model does not learn to stop in the middle; drop leaves the example out.
        loss_on: last trains the last answer of a conversation; all trains each of its answers, as an example with the
            turns before it. The evaluation data is measured in the same way.
        lora_rank: Rank of the LoRA matrices. Default: that of init_lora_path, else 4.
        lora_alpha: LoRA scale; the update is multiplied by lora_alpha / lora_rank. Default: likewise, else 32.
        lora_dropout: Dropout before the LoRA matrices, from 0 to below 1. Default: likewise, else 0.05.
        resume_from_checkpoint: A checkpoint-N directory, latest for the newest complete one of output_dir, or auto
            for the same where there is one, else from scratch: one command for the first start and every restart.
        prompt_text: Text put before every question. Default: that of init_lora_path, else none.
        compute_dtype: Dtype of the matmuls: fp32, fp16, bf16, or auto (bf16 on a GPU that supports it, else fp32).
        lora_targets: Modules that get LoRA: query_key_value, all-linear, or names joined by commas. Default: those of
            init_lora_path, else query_key_value.
        packing: Pack the examples of a batch into one sequence instead of padding them; the gradients are the same.
        early_stopping_patience: Stop when eval_loss has not improved for so many evaluations, and keep the best step
            (load_best_model_at_end). Default: train to the end.
        log_samples: Evaluation examples whose answers TensorBoard's text tab shows at each evaluation.
        dry_run: Report the data, trained weights, steps and memory, then stop before training.
        output_json: File to which the report on the data is written too.
        evaluate_after: Judge the adapter on the evaluation data when it is written, as evaluate_adapter.py does; the
            report goes to a directory beside output_dir, named output_dir + "_evaluation".
    """
    inputs = read_inputs(dict(locals()))
    note_if_interrupted("no step was done, so there is nothing to save")

    from glm_utils.training.lora_model import make_lora_model
    from glm_utils.training.output import claim_output
    from glm_utils.training.preflight import plan_run
    from glm_utils.training.record import begin_run, make_record
    from glm_utils.training.run import encode_data, run_trainer, save_adapter
    from glm_utils.training.settings import resolve_settings
    from glm_utils.training.trainer import leave_process_group, make_trainer

    settings = resolve_settings(inputs)
    if evaluate_after:
        check_evaluation_after(settings)
    with claim_output(settings, dry_run) as start:
        if start.is_finished:
            if output_json:
                logger.warning(f"--output_json {output_json}: not written, as the run is finished")
            leave_process_group()
            return
        encoded = encode_data(settings)
        model = make_lora_model(
            settings.base, settings.compute_dtype, settings.lora_config, settings.training_args, settings.init_adapter
        )
        plan = plan_run(settings, model, encoded["train"])
        if dry_run:
            logger.info("dry run: nothing was trained or written" + (f" but {output_json}" if output_json else ""))
            leave_process_group()
            return
        record = make_record(settings, encoded)
        begin = functools.partial(begin_run, settings, record, start.checkpoint)
        trainer = make_trainer(settings, model, plan, encoded, begin)
        results = run_trainer(trainer, start.checkpoint)
        save_adapter(trainer, record, results)
        trainer.end_processes()
        if evaluate_after:
            # their memory is needed by the model that is judged, read from the adapter's files
            del model, trainer, plan
            evaluate_run(settings)


def check_evaluation_after(settings: "TrainingSettings") -> None:
    """Check before the training what --evaluate_after needs: packages and a directory."""
    from glm_utils.evaluation.at_end import check_evaluation

    check_evaluation(settings.output_dir)


def evaluate_run(settings: "TrainingSettings") -> None:
    """Judge the adapter that was written, on the 4-bit base it was trained on, in the first process."""
    from glm_utils.data.indexed import checked_examples
    from glm_utils.device import resolve_device
    from glm_utils.evaluation.at_end import evaluate_output

    args, out = settings.training_args, settings.output_dir
    release_signals("the adapter is written, but not evaluated")
    if args.process_index == 0:
        device = resolve_device("cpu" if args.use_cpu else "auto")
        data_path, examples = settings.data.source("eval"), checked_examples(settings.examples["eval"])
        evaluate_output(
            out, out, data_path, examples, device, load_in_4bit=True, seed=args.seed, hub=settings.arguments["hub"]
        )


if __name__ == "__main__":
    run_cli(train_qlora, elsewhere=JSON_ONLY)
