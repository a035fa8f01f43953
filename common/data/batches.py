"""Batches whose order and mirroring follow from the seed and the position, so a run resumes exactly."""

import signal
from collections.abc import Generator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.data.image_set import ImageSet
from common.machine import seeding

Batch = tuple[Tensor, Tensor, Tensor]


class Batches:
    """Shuffled batches of one size; an incomplete last batch is left out.

    The order of an epoch is a permutation from (seed, "shuffle", epoch), whether an image is mirrored follows
    from (seed, "flip", epoch, its index): neither depends on workers, ranks, or where the epoch was entered.
    Step s takes the next ``batch_size * world`` images of that order and rank r the r-th part of them, so two
    ranks with 32 images each train on what one with 64 does.

    Args:
        image_set: N images.
        batch_size: images B in a batch of one rank.
        seed: the run's seed.
        flip: mirror each image left to right with probability 1/2.
        workers: processes that gather batches; 0 gathers them in this one.
        rank: this process, of `world` that share each epoch.
        world: how many there are.

    Raises:
        ValueError: if the images do not fill one batch.
    """

    def __init__(
        self,
        image_set: ImageSet,
        batch_size: int,
        seed: int,
        *,
        flip: bool,
        workers: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank: expected 0 to {world - 1}, got {rank}")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
        if len(image_set) < batch_size * world:
            ranks = f" on each of {world} ranks" if world > 1 else ""
            raise ValueError(f"batch_size: expected at most the {len(image_set)} images, got {batch_size}{ranks}")
        self.image_set, self.batch_size, self.seed = image_set, batch_size, seed
        self.flip, self.workers, self.rank, self.world = flip, workers, rank, world

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.image_set) // (self.batch_size * self.world)

    def epoch(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        """Yield the batches of an epoch from the `start`-th on; closing the iterator ends its workers.

        Yields:
            images uint8 (B, 3, H, W), labels int64 (B,), zeros where the set has none, and the images'
            positions in the set, int64 (B,).
        """
        gather = _Gather(self.image_set, self.seed, epoch, self.flip)
        index = self._index(epoch)[start:]
        if not self.workers:
            yield from map(gather.__getitem__, index)
            return
        loader = DataLoader(
            gather,
            batch_size=None,
            sampler=index,
            num_workers=min(self.workers, max(1, len(index))),
            generator=seeding.generator(self.seed, "workers", epoch),  # else the global one is advanced
            worker_init_fn=_leave_signals_to_the_trainer,
        )
        yield from loader

    def _index(self, epoch: int) -> list[Tensor]:
        order = seeding.permutation(len(self.image_set), self.seed, "shuffle", epoch)
        steps = order[: len(self) * self.batch_size * self.world].view(-1, self.world, self.batch_size)
        return list(steps[:, self.rank])


def _leave_signals_to_the_trainer(_worker: int) -> None:
    """Ignore what a terminal or a scheduler sends to the whole group: the trainer finishes its step and saves.

    A worker whose parent is gone ends by itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Gather(Dataset):
    """From the positions of a batch to the batch."""

    def __init__(self, image_set: ImageSet, seed: int, epoch: int, flip: bool) -> None:
        self.images, self.labels = image_set.images, image_set.labels
        self.seed, self.epoch, self.flip = seed, epoch, flip

    def __getitem__(self, index: Tensor) -> Batch:
        images = self.images[index]
        if self.flip:
            mirrored = seeding.uniform_per_sample(index, self.seed, "flip", self.epoch) >= 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        labels = torch.zeros_like(index) if self.labels is None else self.labels[index]
        return images, labels, index
