"""The loss of each example's reference answer, and nothing of its prompt: what training lowers, per example."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizer

from glm_utils.collators import Collator
from glm_utils.data import Example
from glm_utils.encoding import IGNORED_LABEL, encode_examples
from glm_utils.limits import EncodingLimits

MAX_LOGITS = 2**26  # of a batch, before they are widened to fp32 example by example
MAX_TOKENS = 8192  # of a batch, for models with a small vocabulary


@torch.no_grad()
def example_losses(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizer,
    examples: Sequence[Example],
    limits: EncodingLimits,
    max_length: int | None,
) -> np.ndarray:
    """Compute the summed loss of every reference answer, end token included.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        examples: Examples with reference answers.
        limits: Longest prompt and answer, as in training.
        max_length: Longest sequence of the model, in tokens; None: no limit.

    Returns:
        A row per example of (sum of -log p in nats, tokens).
    """
    dataset = encode_examples(examples, tokenizer, limits, max_length).dataset
    collate = Collator(tokenizer.pad_token_id, padding_side="right")
    rows = np.zeros((len(examples), 2))
    max_tokens = min(MAX_TOKENS, MAX_LOGITS // model.config.vocab_size)
    with tqdm(total=len(examples), desc="loss", unit="example", leave=False) as progress:
        for indices in batches_of_similar_length(dataset["length"], max_tokens):
            batch = collate([dataset[index] for index in indices])
            labels = batch["labels"][:, 1:]
            first = int((labels != IGNORED_LABEL).any(dim=0).nonzero()[0])  # no logits of what is prompt everywhere
            logits = model(
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
                logits_to_keep=torch.arange(first, labels.shape[1], device=model.device),
                use_cache=False,
            ).logits
            for index, example_logits, targets in zip(indices, logits, labels[:, first:], strict=True):
                counted = targets != IGNORED_LABEL
                targets = targets[counted].to(model.device)
                example_logits = example_logits[counted.to(model.device)].float()
                loss = torch.nn.functional.cross_entropy(example_logits, targets, reduction="sum")
                rows[index] = loss.item(), len(targets)
            progress.update(len(indices))
    return rows


def batches_of_similar_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Yield the places of examples in batches, long ones first, so that memory that runs out does so at once.

    Args:
        lengths: Tokens of each example.
        max_tokens: Most tokens of a batch, padding included; a longer example is a batch of its own.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
