"""The baselines: transformers' own GlmForCausalLM of ChatGLM2's shape, with `generate` and the Trainer as they are.

ChatGLM2-6B is a Glm, with the same mathematics: its config translated is enough, the weights are random.
"""

import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from transformers import (
    GlmConfig,
    GlmForCausalLM,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    Trainer,
    TrainingArguments,
)

from benchmarks.harness.random_models import quantize_to_nf4, random_model
from benchmarks.harness.train_steps import DEVICE, WARM_UP_STEPS, encode_file, profiled, synchronize
from glm_utils.checkpoint import load_classes, open_checkpoint
from glm_utils.cli import UserError
from glm_utils.collators import Collator
from glm_utils.export.glm_names import native_config
from glm_utils.family import detect_family
from glm_utils.inference.measure import Generate, Workload
from glm_utils.training.lora_model import make_lora_config


def glm_config(config: dict, path: Path) -> GlmConfig:
    """Translate a ChatGLM2 config as the export to GlmForCausalLM does.

    Args:
        config: Parsed config.json.
        path: Its path, for the error.

    Raises:
        UserError: The config is not that of a ChatGLM2.
    """
    family = detect_family(config, path)
    if family.native_class is None:
        raise UserError("only ChatGLM2 has a native counterpart in transformers. Leave the case native out")
    return GlmConfig.from_dict(native_config(load_classes(family).config.from_dict(config), family.native_class))


# ---- generation


class MarkEachToken(StoppingCriteria):
    """Call a function after each token and never stop."""

    def __init__(self, mark: Callable[[], None]):
        self.mark = mark

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        """Return False for each sequence."""
        self.mark()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def stock_generate(model: PreTrainedModel, workload: Workload) -> Generate:
    """Return a function that generates greedily with a dynamic cache; an end token does not stop it."""
    input_ids = workload.input_ids

    def generate(mark: Callable[[], None]) -> int:
        ids = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=workload.new_tokens,
            do_sample=False,
            eos_token_id=None,
            stopping_criteria=StoppingCriteriaList([MarkEachToken(mark)]),
        )
        return ids.shape[1] - input_ids.shape[1]

    return generate


# ---- training


def stock_train(settings: dict, model_dir: Path, train_data_path: str, work_dir: Path) -> dict:
    """Train with padded batches and full logits; return tokens per second and the profile of two steps."""
    dataset, tokenizer = encode_file(model_dir, train_data_path)
    model = trainable_model(model_dir, torch.float32 if settings.get("fp32") else torch.bfloat16)
    collator, counts, times = Collator(tokenizer.pad_token_id, "right"), [], []

    def collate(features: list) -> dict:
        batch = collator(features)
        del batch["loss_positions"]
        return batch

    class Counting(Trainer):
        def training_step(self, model, inputs, *args):
            if len(counts) % self.args.gradient_accumulation_steps == 0:
                synchronize()
                times.append(time.perf_counter())
            counts.append(int(inputs["attention_mask"].sum()))
            return super().training_step(model, inputs, *args)

    checkpointing, size = settings.get("checkpointing", False), settings["batch"]
    args = TrainingArguments(
        output_dir=str(work_dir), max_steps=settings["steps"], per_device_train_batch_size=size,
        gradient_accumulation_steps=settings.get("parts", 1), learning_rate=3e-4, bf16=not settings.get("fp32"),
        gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
        remove_unused_columns=False, save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=100,
        use_cpu=DEVICE == "cpu",
    )  # fmt: skip
    Counting(model=model, args=args, train_dataset=dataset, data_collator=collate).train()
    synchronize()
    warm_up = min(WARM_UP_STEPS, settings["steps"] - 2)
    seconds, first = time.perf_counter() - times[warm_up], warm_up * settings.get("parts", 1)
    batches = [
        {
            key: value.to(DEVICE)
            for key, value in collate([dataset[index] for index in range(start, start + size)]).items()
        }
        for start in (0, size)
    ]
    with torch.autocast(DEVICE, torch.bfloat16, enabled=not settings.get("fp32")):
        found = profiled(lambda batch: model(**batch).loss.backward(), batches)
    return {"tokens_per_second": sum(counts[first:]) / seconds, "profile": found}


def trainable_model(model_dir: Path, dtype: torch.dtype) -> peft.PeftModel:
    """Build the model in NF4, with peft's LoRA on q, k and v.

    Args:
        model_dir: A ChatGLM2 directory, whose config gives the shape.
        dtype: Of the matmuls and, if fp32, of everything that is not NF4, which is bf16 otherwise.
    """
    config = glm_config(open_checkpoint(model_dir).config, model_dir / "config.json")
    model = random_model(GlmForCausalLM, config, torch.bfloat16, torch.device(DEVICE)).train()
    quantize_to_nf4(model, dtype)
    model.config.use_cache = False
    if dtype == torch.float32:
        model = model.to(dtype)
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return peft.get_peft_model(model, make_lora_config(8, 32, 0.05, ["q_proj", "k_proj", "v_proj"]))
