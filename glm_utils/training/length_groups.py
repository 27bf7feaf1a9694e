"""Examples of similar length in one step, for padded batches."""

from collections.abc import Iterator

import torch
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from glm_utils.training.settings import examples_per_step


class LengthGroups(LengthGroupedSampler):
    """Group examples of similar length, in an order that depends only on the seed and the epoch.

    The Trainer's own order depends on the random state at the start of the epoch, which a resumed run does not have.
    """

    def __init__(self, trainer: Trainer):
        super().__init__(examples_per_step(trainer.args), lengths=list(trainer.train_dataset["length"]))
        self.trainer = trainer

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of an epoch's examples."""
        args, epoch = self.trainer.args, int(self.trainer.state.epoch or 0)
        self.generator = torch.Generator().manual_seed(
            epoch + (args.seed if args.data_seed is None else args.data_seed)
        )
        return super().__iter__()
