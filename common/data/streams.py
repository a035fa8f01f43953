"""Streams of batches whose order and views follow from the seed and the position, so a run resumes exactly."""

import signal
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.data.image_set import ImageSet
from common.runtime import seeding
from common.runtime.command import STOPPING
from common.runtime.errors import RankError, UsageError


class View(Protocol):
    """Augments uint8 images (B, 3, H, W) at positions ``index`` (B,) of their set.

    It draws for each image from (seed, position, its index) and nothing else.
    """

    def __call__(self, images: Tensor, index: Tensor, seed: int, *position: int | str) -> Tensor: ...  # noqa: D102


def plain(images: Tensor, index: Tensor, seed: int, *position: int | str) -> Tensor:
    """Show images as they are."""
    return images


def mirrored(images: Tensor, index: Tensor, seed: int, *position: int | str) -> Tensor:
    """Mirror each image left to right with probability 1/2."""
    mirror = seeding.uniform_per_sample(index, seed, "flip", *position) >= 0.5
    return torch.where(mirror[:, None, None, None], images.flip(-1), images)


@dataclass(frozen=True)
class PerImage:
    """A view made image by image: ``function(image, seed)`` maps uint8 (3, H, W) and that image's own seed."""

    function: Callable[[Tensor, int], Tensor]

    def __call__(self, images: Tensor, index: Tensor, seed: int, *position: int | str) -> Tensor:
        """Return the views, stacked."""
        seeds = (seeding.derive(seed, "image", *position, i) for i in index.tolist())
        return torch.stack([self.function(image, own) for image, own in zip(images, seeds, strict=True)])


@dataclass(frozen=True, eq=False)
class Stream:
    """Images that training draws from, ``batch_size`` at once on each rank, and the views of them that a step takes."""

    images: ImageSet
    batch_size: int
    views: tuple[View, ...] = (plain,)


@dataclass(frozen=True, eq=False)
class Batch:
    """Images of one stream.

    Attributes:
        views: a tensor of B images for each view, uint8 (B, 3, H, W) unless the view says otherwise.
        labels: int64 (B,), zeros where the set has none.
        index: the images' positions in the set, int64 (B,), on the CPU.
    """

    views: tuple[Tensor, ...]
    labels: Tensor
    index: Tensor

    @property
    def images(self) -> Tensor:
        """The first view."""
        return self.views[0]

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with views and labels on a device."""
        views = tuple(view.to(device, non_blocking=True) for view in self.views)
        return replace(self, views=views, labels=self.labels.to(device, non_blocking=True))


Step = list[dict[str, Batch]]
"""For each micro-batch of a training step a batch of every stream, by name."""
_Place = tuple[int, Tensor]  # a pass over a stream, and positions in its set


class StepLoader:
    """The batches of every training step, from one or more streams.

    A pass over a stream is a permutation of its images from (seed, stream, "shuffle", pass), cut into batches of one
    size; an incomplete last batch is left out. An epoch is one pass of the stream ``epoch_of``, or
    ``steps_per_epoch`` steps; the other streams start their next pass whenever one is done. Batch b of a pass is
    the next ``batch_size * world`` images of its order and rank r takes the r-th part of them, so two ranks with 32
    images each train on what one with 64 does. Nothing depends on workers, ranks, or where an epoch was entered.

    Args:
        streams: by name; the draws of ``epoch_of`` are keyed without its name.
        epoch_of: the stream whose pass is an epoch.
        steps_per_epoch: steps of an epoch, or None for one pass.
        grad_accum_steps: micro-batches of a step, each with a batch of every stream.
        workers: processes that gather batches; 0 gathers them in a thread of this one.
        rank: this process, of ``world`` that share each step.
        world: number of processes.

    Raises:
        ValueError: if a stream's images do not fill one step, or a number is out of range.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        *,
        epoch_of: str = "train",
        steps_per_epoch: int | None = None,
        grad_accum_steps: int = 1,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank: expected 0 to {world - 1}, got {rank}")
        for stream in streams.values():
            size, count = stream.batch_size, len(stream.images)
            if size < 1:
                raise ValueError(f"batch_size: expected 1 or more, got {size}")
            if count < size * world * grad_accum_steps:
                ranks = f" on each of {world} ranks" if world > 1 else ""
                times = f" {grad_accum_steps} times" if grad_accum_steps > 1 else ""
                raise ValueError(f"batch_size: expected at most the {count} images, got {size}{times}{ranks}")
        self.streams, self.epoch_of, self.grad_accum_steps = dict(streams), epoch_of, grad_accum_steps
        self.workers, self.rank, self.world = workers, rank, world
        self._own_steps = steps_per_epoch
        self.batch_size = sum(stream.batch_size for stream in streams.values())

    def __len__(self) -> int:
        """Steps in an epoch."""
        return self._own_steps or self._batches(self.epoch_of) // self.grad_accum_steps

    def epoch(self, epoch: int, start: int, seed: int) -> Generator[Step, None, None]:
        """Yield the steps of an epoch from the `start`-th on; closing the iterator ends its workers, or its thread.

        Without workers a thread gathers the next step while the caller is busy with one: OpenCV and torch compute
        without holding the interpreter. What goes wrong there is raised here, when the step is asked for.
        """
        gather = _Gather(self.streams, self.epoch_of, seed)
        places = self._places(epoch, start, seed)
        if not self.workers:
            yield from _one_ahead(gather, places)
            return
        loader = DataLoader(
            gather,
            batch_size=None,
            sampler=places,
            num_workers=min(self.workers, max(1, len(places))),
            collate_fn=_unchanged,
            generator=seeding.generator(seed, "workers", epoch),  # else the global one is advanced
            worker_init_fn=_ignore_signals,
        )
        steps: Any = iter(loader)
        try:
            for step in steps:
                if isinstance(step, UsageError):
                    raise step
                yield step
        except (EOFError, ConnectionError) as error:
            if str(error).startswith("Caught"):  # by a worker, from a view
                raise
            raise RuntimeError("DataLoader worker (pid unknown) ended while it handed over a step") from error
        finally:
            # A traceback may hold the iterator, and then Python's exit waits for workers, which ignore its SIGTERM.
            steps._shutdown_workers()

    def _batches(self, name: str) -> int:
        stream = self.streams[name]
        return len(stream.images) // (stream.batch_size * self.world)

    def _places(self, epoch: int, start: int, seed: int) -> list[list[dict[str, _Place]]]:
        orders: dict[tuple[str, int], Tensor] = {}

        def place(name: str, number: int) -> _Place:
            """Find batch ``number``, counted through the run, or through the epoch where the stream makes it."""
            if name == self.epoch_of and self._own_steps is None:
                pass_index, batch = epoch, number - epoch * len(self) * self.grad_accum_steps
            else:
                pass_index, batch = divmod(number, self._batches(name))
            if (name, pass_index) not in orders:
                stream = self.streams[name]
                position = (*_prefix(name, self.epoch_of), "shuffle", pass_index)
                order = seeding.permutation(len(stream.images), seed, *position)
                used = self._batches(name) * stream.batch_size * self.world
                orders[name, pass_index] = order[:used].view(-1, self.world, stream.batch_size)
            return pass_index, orders[name, pass_index][batch, self.rank]

        first, last = epoch * len(self) + start, (epoch + 1) * len(self)
        return [
            [
                {name: place(name, step * self.grad_accum_steps + micro) for name in self.streams}
                for micro in range(self.grad_accum_steps)
            ]
            for step in range(first, last)
        ]


def _one_ahead(gather: "_Gather", places: list[list[dict[str, _Place]]]) -> Iterator[Step]:
    """Gather steps in a thread, which does the next one while the last is used."""
    with ThreadPoolExecutor(1, "batches") as thread:
        ahead = [thread.submit(gather, place) for place in places[:1]]
        for place in places[1:]:
            done = ahead.pop().result()
            ahead.append(thread.submit(gather, place))
            yield done
        yield from (last.result() for last in ahead)


def _prefix(name: str, epoch_of: str) -> tuple[str, ...]:
    return () if name == epoch_of else (name,)


def _unchanged(step: Step | UsageError) -> Step | UsageError:
    return step


def _ignore_signals(_worker: int) -> None:
    """Ignore what a terminal or a scheduler sends to the whole group: the trainer finishes its step and saves.

    A worker whose parent is gone ends by itself.
    """
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_IGN)


class _Gather(Dataset):
    """Gathers the batches of a step from its places; as a `Dataset`, in another process."""

    def __init__(self, streams: Mapping[str, Stream], epoch_of: str, seed: int) -> None:
        self.streams, self.epoch_of, self.seed = streams, epoch_of, seed

    def __call__(self, places: list[dict[str, _Place]]) -> Step:
        try:
            return [{name: self._batch(name, *place) for name, place in micro.items()} for micro in places]
        except UsageError as error:
            raise RankError(str(error)) from error

    def __getitem__(self, places: list[dict[str, _Place]]) -> Step | UsageError:
        """Return the step, in memory that both processes share.

        A UsageError is handed over as the step: the loader would raise it with the worker's traceback as its message.
        The queue would share the memory in a thread of its own, whose errors nobody hears of while the step is waited
        for.
        """
        try:
            step = self(places)
        except UsageError as error:
            return error
        try:
            for batch in (batch for micro in step for batch in micro.values()):
                for tensor in (*batch.views, batch.labels, batch.index):
                    tensor.share_memory_()
        except RuntimeError as error:
            return RankError(
                f"workers: the memory that processes share is used up ({error}); take fewer workers or a smaller "
                "batch_size, or give /dev/shm more (docker run --shm-size)"
            )
        return step

    def _batch(self, name: str, pass_index: int, index: Tensor) -> Batch:
        stream, prefix = self.streams[name], _prefix(name, self.epoch_of)
        images, labels = stream.images.images[index], stream.images.labels
        views = tuple(
            view(images, index, self.seed, *prefix, *(("view", number) if number else ()), pass_index)
            for number, view in enumerate(stream.views)
        )
        return Batch(views, torch.zeros_like(index) if labels is None else labels[index], index)
