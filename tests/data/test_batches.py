import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from common.data import Batches, ImageSet
from common.machine.seeding import uniform_per_sample


def image_set(n=23, labelled=True):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(n) % 3 if labelled else None
    return ImageSet(images, labels, ("a", "b", "c") if labelled else (), "toy", "train")


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


@pytest.mark.parametrize("workers", [0, 2])
def test_mirrored_images_are_those_the_seed_names(workers):
    data = image_set()
    for images, _, index in batches(flip=True, workers=workers, seed=5).epoch(3):
        mirrored = uniform_per_sample(index, 5, "flip", 3) >= 0.5
        for image, i, mirror in zip(images.numpy(), index.tolist(), mirrored.tolist(), strict=True):
            want = data.images[i].numpy()
            assert np.array_equal(image, want[:, :, ::-1] if mirror else want)


def test_both_mirrored_and_plain_images_occur():
    mirrored = torch.cat([uniform_per_sample(i, 0, "flip", 0) >= 0.5 for _, _, i in batches(200).epoch(0)])
    # 200 fair coins: outside 60..140 with probability below 1e-8
    assert 60 <= int(mirrored.sum()) <= 140


@pytest.mark.parametrize("start", [0, 1, 4, 5])
@pytest.mark.parametrize("workers", [0, 2])
def test_entering_an_epoch_late_gives_its_tail(start, workers):
    whole = list(batches(flip=True).epoch(2))
    assert same(list(batches(flip=True, workers=workers).epoch(2, start)), whole[start:])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_generator_is_not_advanced(workers):
    torch.manual_seed(9)
    before = torch.get_rng_state()
    list(batches(flip=True, workers=workers).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_share_what_one_process_with_the_whole_batch_sees():
    alone = [i for _, _, i in batches(40, 8).epoch(0)]
    ranks = [[i for _, _, i in batches(40, 4, rank=r, world=2).epoch(0)] for r in (0, 1)]
    assert all(torch.equal(torch.cat(pair), i) for *pair, i in zip(*ranks, alone, strict=True))


def test_closing_early_ends_the_workers():
    iterator = batches(workers=2).epoch(0)
    next(iterator)
    assert len(multiprocessing.active_children()) == 2
    iterator.close()
    assert not multiprocessing.active_children()


def test_workers_leave_signals_to_the_process_that_trains():
    iterator = batches(workers=2).epoch(0)
    got = [next(iterator), next(iterator)]  # one of each worker, which is ready then
    for worker in multiprocessing.active_children():
        assert worker.pid is not None
        for signum in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker.pid, signum)
    got += iterator
    assert same(got, list(batches().epoch(0)))


def test_unlabelled_images_have_label_zero():
    got = list(Batches(image_set(labelled=False), 4, 0, flip=False, workers=0).epoch(0))
    assert all(y.dtype == torch.int64 and not y.any() for _, y, _ in got)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 24}, "batch_size: expected at most the 23 images, got 24"),
        ({"size": 12, "world": 2}, "at most the 23 images, got 12 on each of 2 ranks"),
        ({"size": 0}, "batch_size: expected 1 or more"),
        ({"rank": 2, "world": 2}, "rank: expected 0 to 1"),
    ],
)
def test_refuses_batches_that_cannot_be_filled(arguments, message):
    with pytest.raises(ValueError, match=message):
        batches(**arguments)
