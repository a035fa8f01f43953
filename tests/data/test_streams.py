import multiprocessing
import os
import signal
import threading
from typing import Any

import pytest
import torch

from common.data import ImageSet, PerImage, StepLoader, Stream, mirrored, plain
from common.runtime import seeding
from common.runtime.seeding import uniform_per_sample


def image_set(n=23):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(n) % 3, ("a", "b", "c"), "toy", "train")


class Batches:
    """A feed of one stream, its batches as (images, labels, index)."""

    def __init__(self, data, size, seed, *, flip=False, **options):
        self.feed = StepLoader({"train": Stream(data, size, (mirrored if flip else plain,))}, **options)
        self.seed = seed

    def __len__(self):
        return len(self.feed)

    def epoch(self, epoch, start=0):
        for ((step,),) in ([parts] for parts in self.feed.epoch(epoch, start, self.seed)):
            yield step["train"].images, step["train"].labels, step["train"].index


def batches(n=23, size=4, seed=0, *, flip=False, workers=0, **shares):
    return Batches(image_set(n), size, seed, flip=flip, workers=workers, **shares)


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for i, j in zip(a, b, strict=True) for x, y in zip(i, j, strict=True)
    )


def test_an_epoch_shows_each_image_at_most_once_with_its_own_label():
    data, got = image_set(), list(batches().epoch(0))
    assert len(got) == len(batches()) == 23 // 4
    index = torch.cat([i for _, _, i in got])
    assert len(index.unique()) == 20
    assert torch.equal(torch.cat([x for x, _, _ in got]), data.images[index])
    assert torch.equal(torch.cat([y for _, y, _ in got]), index % 3)


def test_order_follows_from_seed_and_epoch():
    first = [i.tolist() for _, _, i in batches().epoch(0)]
    assert first == [i.tolist() for _, _, i in batches().epoch(0)]
    assert first != [i.tolist() for _, _, i in batches().epoch(1)]
    assert first != [i.tolist() for _, _, i in batches(seed=1).epoch(0)]
    assert indices(two(), "other", 1) != indices(two(), "other", 1, seed=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_mirrored_images_are_those_the_seed_names_and_the_global_generator_stays(workers):
    data, flips = image_set(), []
    torch.manual_seed(9)
    before = torch.get_rng_state()
    for images, _, index in batches(flip=True, workers=workers, seed=5).epoch(3):
        mirrored = uniform_per_sample(index, 5, "flip", 3) >= 0.5
        flips += mirrored.tolist()
        assert torch.equal(
            images, torch.where(mirrored[:, None, None, None], data.images[index].flip(-1), data.images[index])
        )
    assert 0 < sum(flips) < len(flips) == 20
    assert torch.equal(torch.get_rng_state(), before)


def test_entering_an_epoch_late_gives_its_tail():
    whole = list(batches(flip=True).epoch(2))
    for workers, start in ((0, 0), (0, 1), (0, 4), (0, 5), (2, 1), (2, 5)):
        assert same(list(batches(flip=True, workers=workers).epoch(2, start)), whole[start:])


class Noting:
    """A view that notes the images of each batch it is asked for, and fails at one of them."""

    def __init__(self, fails_at=-1):
        self.seen, self.ready, self.fails_at = [], threading.Semaphore(0), fails_at

    def __call__(self, images, index, seed, *position):
        self.seen.append((threading.current_thread(), index))
        self.ready.release()
        if len(self.seen) == self.fails_at:
            raise RuntimeError(f"batch {self.fails_at}")
        return images

    def wait_for_one(self):
        assert self.ready.acquire(timeout=30)


def test_without_workers_a_thread_is_one_step_ahead_and_ends_with_the_iterator():
    noting = Noting()
    steps = StepLoader({"train": Stream(image_set(), 4, (noting,))}).epoch(0, 0, 0)
    given = [next(steps)]
    noting.wait_for_one()
    noting.wait_for_one()  # the second step is made though nobody has asked for it
    assert not noting.ready.acquire(timeout=0.2)
    given.append(next(steps))
    noting.wait_for_one()
    assert [step[0]["train"].index.tolist() for step in given] == [index.tolist() for _, index in noting.seen[:2]]
    ((thread, _), *_) = noting.seen
    assert thread is not threading.current_thread()
    assert thread.is_alive()
    steps.close()
    assert not thread.is_alive()
    assert len(noting.seen) == 3


def test_what_goes_wrong_in_the_thread_is_raised_where_the_step_is_asked_for():
    steps = StepLoader({"train": Stream(image_set(), 4, (Noting(fails_at=3),))}).epoch(0, 0, 0)
    assert [next(steps), next(steps)]
    with pytest.raises(RuntimeError, match="batch 3"):
        next(steps)


def test_workers_ignore_signals_and_end_when_the_iterator_is_closed():
    iterator = batches(workers=2).epoch(0)
    got = [next(iterator), next(iterator)]  # one of each worker, which is ready then
    assert len(multiprocessing.active_children()) == 2
    for worker in multiprocessing.active_children():
        assert worker.pid is not None
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(worker.pid, signum)
    got.append(next(iterator))
    assert same(got, list(batches().epoch(0))[:3])
    iterator.close()
    assert not multiprocessing.active_children()


def test_refuses_batches_that_cannot_be_filled():
    cases: dict[str, dict[str, Any]] = {
        "batch_size: expected at most the 23 images, got 24": {"size": 24},
        "at most the 23 images, got 12 on each of 2 ranks": {"size": 12, "world": 2},
        "batch_size: expected 1 or more": {"size": 0},
        "rank: expected 0 to 1": {"rank": 2, "world": 2},
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            batches(**arguments)


def two(steps_per_epoch=None, workers=0, rank=0, world=1, grad_accum_steps=1):
    """Make a stream of 23 images in batches of 4, and one of 7 in batches of 3, shown plainly and mirrored."""
    streams = {"train": Stream(image_set(), 4 // world), "other": Stream(image_set(7), 3, (mirrored, plain, mirrored))}
    options: Any = {"workers": workers, "rank": rank, "world": world, "grad_accum_steps": grad_accum_steps}
    return StepLoader(streams, steps_per_epoch=steps_per_epoch, **options)


def indices(feed, name, epochs, seed=0):
    """Return which images each part of each step takes of a stream."""
    return [part[name].index.tolist() for e in range(epochs) for step in feed.epoch(e, 0, seed) for part in step]


def test_a_shorter_stream_starts_its_next_pass_and_every_pass_has_an_order_of_its_own():
    feed = two()
    assert len(feed) == 5
    taken = indices(feed, "other", 2)  # 10 steps of 3 of 7 images: five passes of two batches
    passes = [sorted(taken[i] + taken[i + 1]) for i in range(0, 10, 2)]
    assert all(len(set(images)) == 6 for images in passes)
    assert len({tuple(taken[i] + taken[i + 1]) for i in range(0, 10, 2)}) == 5
    for turn in range(5):  # as the order is defined
        order = seeding.permutation(7, 0, "other", "shuffle", turn).tolist()
        assert taken[2 * turn] + taken[2 * turn + 1] == order[:6]


def test_with_steps_per_epoch_passes_run_over_epochs():
    feed = two(steps_per_epoch=3)
    assert len(feed) == 3
    taken = indices(feed, "train", 4)
    assert len(taken) == 12
    for turn in range(2):  # a pass has five batches
        order = seeding.permutation(23, 0, "shuffle", turn).tolist()
        assert [i for batch in taken[5 * turn : 5 * turn + 5] for i in batch] == order[:20]


def test_parts_of_a_step_are_the_batches_of_smaller_steps():
    small, large = two(), two(grad_accum_steps=2)
    assert len(large) == 2  # five batches make two steps of two
    assert indices(large, "train", 1) == indices(small, "train", 1)[:4]
    steps = list(large.epoch(1, 0, 0))
    assert [len(step) for step in steps] == [2, 2]
    assert [part["train"].index.tolist() for part in steps[0]] == indices(small, "train", 2)[5:7]


@pytest.mark.parametrize("workers", [0, 2])
def test_views_draw_by_seed_stream_view_pass_and_image(workers):
    data = image_set(7).images
    for number, (part,) in enumerate(two(workers=workers).epoch(0, 0, 5)):
        first, straight, third = part["other"].views
        index, turn = part["other"].index, number // 2
        assert torch.equal(straight, data[index])
        for view, position in ((first, ("other", turn)), (third, ("other", "view", 2, turn))):
            flips = uniform_per_sample(index, 5, "flip", *position) >= 0.5
            want = torch.where(flips[:, None, None, None], data[index].flip(-1), data[index])
            assert torch.equal(view, want)


def test_a_view_image_by_image_gives_each_its_own_seed_whatever_the_batch():
    def shifted(image, seed):
        return image.roll(seed % 8, dims=-1)

    view, data = PerImage(shifted), image_set(9).images
    index = torch.tensor([3, 1, 8])
    shown = view(data[index], index, 4, "pass", 2)
    alone = [view(data[i : i + 1], torch.tensor([i]), 4, "pass", 2)[0] for i in index.tolist()]
    assert all(torch.equal(a, b) for a, b in zip(shown, alone, strict=True))
    same = data[:1].expand(9, -1, -1, -1)
    assert len({tuple(x.flatten().tolist()) for x in view(same, torch.arange(9), 4, 0)}) > 2  # crops differ
    assert not torch.equal(view(same, torch.arange(9), 4, 0), view(same, torch.arange(9), 4, 1))


def test_two_ranks_share_the_batches_of_one():
    for name in ("train", "other"):
        streams = {"train": Stream(image_set(), 4), "other": Stream(image_set(9), 2)}
        half = {"train": Stream(image_set(), 2), "other": Stream(image_set(9), 1)}
        alone = indices(StepLoader(streams), name, 2)
        pair = [indices(StepLoader(half, rank=rank, world=2), name, 2) for rank in (0, 1)]
        assert [a + b for a, b in zip(*pair, strict=True)] == alone
