"""Turn encoded examples into batches: padded to one length, or packed end to end."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from glm_utils.encoding import IGNORED_LABEL


def loss_positions(labels: torch.Tensor) -> torch.Tensor:
    """Return the flat positions in labels (B, S) whose next token is trained.

    They are found here, on the CPU, so that no forward pass has to wait for the GPU to count them.
    """
    counts = torch.nn.functional.pad(labels[:, 1:] != IGNORED_LABEL, (0, 1))
    return counts.flatten().nonzero().flatten()


@dataclass(frozen=True)
class Collator:
    """Pad encoded examples to one length.

    Attributes:
        padding_side: right or left.
    """

    pad_token_id: int
    padding_side: str

    def __call__(self, features: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Return input_ids, attention_mask (1 = keep) and labels, int64 (B, S), and loss_positions, int64 (M,)."""
        width = max(len(feature["input_ids"]) for feature in features)
        batch = {
            "input_ids": torch.full((len(features), width), self.pad_token_id),
            "attention_mask": torch.zeros((len(features), width), dtype=torch.long),
            "labels": torch.full((len(features), width), IGNORED_LABEL),
        }
        for index, feature in enumerate(features):
            length = len(feature["input_ids"])
            columns = slice(0, length) if self.padding_side == "right" else slice(width - length, width)
            batch["input_ids"][index, columns] = torch.as_tensor(feature["input_ids"], dtype=torch.long)
            batch["attention_mask"][index, columns] = 1
            batch["labels"][index, columns] = torch.as_tensor(feature["labels"], dtype=torch.long)
        return {**batch, "loss_positions": loss_positions(batch["labels"])}


@dataclass(frozen=True)
class PackingCollator:
    """Pack the encoded examples of a batch end to end into one sequence, without padding.

    A batch holds the same examples as with padding. No token predicts the first token of the next example.
    """

    def __call__(self, features: Sequence[dict]) -> dict[str, torch.Tensor | int]:
        """Return a batch.

        It has input_ids and labels, int64 (1, T), loss_positions, int64 (M,), and the boundaries of the examples under
        the names of transformers' FlashAttentionKwargs.
        """
        lengths = [len(feature["input_ids"]) for feature in features]
        ids = itertools.chain.from_iterable(feature["input_ids"] for feature in features)
        labels = torch.tensor([[*itertools.chain.from_iterable(feature["labels"] for feature in features)]])
        labels[0, [0, *itertools.accumulate(lengths[:-1])]] = IGNORED_LABEL
        return {
            "input_ids": torch.tensor([[*ids]]),
            "labels": labels,
            "loss_positions": loss_positions(labels),
            "cu_seq_lens_q": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
            "max_length_q": max(lengths),
        }
