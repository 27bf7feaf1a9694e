"""The order of the training examples; it depends on the seed and the epoch alone, so a resumed run has the same."""

from collections.abc import Iterator

import torch
from torch.utils.data import RandomSampler, Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from glm_utils.training.steps import examples_per_step
from glm_utils.training.streamed import StreamedDataset

CHUNK = 1 << 16  # indices that are Python numbers at a time


class LengthGroups(LengthGroupedSampler):
    """Group examples of similar length, in an order that depends only on the seed and the epoch.

    The Trainer's own order depends on the random state at the start of the epoch, which a resumed run does not have.
    """

    def __init__(self, trainer: Trainer):
        super().__init__(examples_per_step(trainer.args), lengths=list(trainer.train_dataset["length"][:]))
        self.trainer = trainer

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of an epoch's examples."""
        args, epoch = self.trainer.args, int(self.trainer.state.epoch or 0)
        self.generator = torch.Generator().manual_seed(
            epoch + (args.seed if args.data_seed is None else args.data_seed)
        )
        return super().__iter__()


class CompactOrder(Sampler[int]):
    """The order of accelerate's SeedableRandomSampler in 8 bytes an example; as Python numbers it would take 40.

    Args:
        num_examples: Examples of an epoch.
        seed: Seed of the first epoch; each later one adds 1.
    """

    def __init__(self, num_examples: int, seed: int):
        self.num_examples, self.seed, self.epoch = num_examples, seed, 0

    def __len__(self) -> int:
        return self.num_examples

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of an epoch's examples."""
        order = torch.randperm(self.num_examples, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        for part in order.split(CHUNK):
            yield from part.tolist()
        self.set_epoch(self.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; accelerate and the Trainer call it."""
        self.epoch = epoch


def choose_sampler(trainer: Trainer, usual: Sampler | None) -> Sampler | None:
    """Return the sampler of the training examples.

    Args:
        trainer: The Trainer.
        usual: The one that it would take, unless examples are grouped by length.
    """
    if not isinstance(usual, RandomSampler) or not isinstance(trainer.train_dataset, StreamedDataset):
        return usual
    if not trainer.accelerator.use_seedable_sampler:  # accelerator_config says so
        return usual
    seed = trainer.accelerator.dataloader_config.data_seed
    return CompactOrder(len(trainer.train_dataset), torch.random.initial_seed() if seed is None else seed)
