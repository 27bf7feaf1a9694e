"""The yardstick: transformers' native Glm of ChatGLM2's shape, with peft, bitsandbytes and the Trainer as they are."""

import time
from pathlib import Path

import datasets
import peft
import torch
from native_glm import glm_config
from random_model import random_model, replace_linears
from step_profile import DEVICE, WARM_UP_STEPS, profiled, synchronize
from transformers import GlmForCausalLM, PreTrainedTokenizer, Trainer, TrainingArguments

from glm_utils.checkpoint import check_checkpoint, load_tokenizer
from glm_utils.data import read_rows
from glm_utils.encoding import Collator, EncodingLimits, encode_rows
from glm_utils.qlora import make_lora_config


def encode(model_dir: Path, train_data_path: str) -> tuple[datasets.Dataset, PreTrainedTokenizer]:
    """Return the encoded rows and the tokenizer."""
    tokenizer = load_tokenizer(model_dir)
    rows = read_rows(Path(train_data_path))
    return encode_rows(rows, tokenizer, EncodingLimits(512, 1536)).dataset, tokenizer


def stock_model(model_dir: Path, dtype: torch.dtype) -> peft.PeftModel:
    """Build native Glm of ChatGLM2's shape with random weights in NF4, and peft's LoRA on q, k and v."""
    config = glm_config(check_checkpoint(model_dir), model_dir / "config.json")
    model = random_model(GlmForCausalLM, config, torch.bfloat16, torch.device(DEVICE)).train()
    replace_linears(model, dtype)
    model.config.use_cache = False
    if dtype == torch.float32:
        model = model.to(dtype)
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return peft.get_peft_model(model, make_lora_config(8, 32, 0.05, ["q_proj", "k_proj", "v_proj"]))


def stock_run(settings: dict, model_dir: Path, train_data_path: str, work_dir: Path) -> dict:
    """Run transformers' Trainer as it is on native Glm: padded batches, full logits."""
    dataset, tokenizer = encode(model_dir, train_data_path)
    model = stock_model(model_dir, torch.float32 if settings.get("fp32") else torch.bfloat16)
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
