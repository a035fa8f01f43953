import pytest
import torch

from common.data import ImageSet, hold_out
from common.runtime.errors import UsageError


def image_set(counts: list[int], labelled: bool = True) -> ImageSet:
    """Make images whose first pixel is their number, so many of each class."""
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate(counts)])[torch.randperm(sum(counts))]
    images = torch.arange(sum(counts), dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 8, 8)
    names = tuple("abc"[: len(counts)])
    return ImageSet(images, labels if labelled else None, names if labelled else (), "toy", "train")


def numbers(part: ImageSet) -> list[int]:
    return part.images[:, 0, 0, 0].tolist()


def test_a_share_of_each_class_is_held_out_and_nothing_is_lost():
    whole = image_set([40, 10, 3])
    train, held = hold_out(whole, 0.2, seed=0)
    assert held.labels is not None
    assert torch.bincount(held.labels).tolist() == [8, 2, 1]  # round(0.6) is 1; a class gives at least one
    assert sorted(numbers(train) + numbers(held)) == list(range(53))
    assert numbers(train) == sorted(numbers(train))  # the order of the set
    assert (train.split, held.split) == ("train", "validation")
    assert whole.labels is not None
    assert held.labels.tolist() == whole.labels[torch.tensor(numbers(held))].tolist()
    tiny = hold_out(whole, 0.01, seed=0)[1]
    assert tiny.labels is not None
    assert torch.bincount(tiny.labels).tolist() == [1, 1, 1]


def test_which_images_follows_from_the_seed_alone():
    whole = image_set([40, 30])
    one, again, other = (numbers(hold_out(whole, 0.2, seed)[1]) for seed in (0, 0, 1))
    assert one == again
    assert one != other


def test_images_without_labels_are_one_class():
    train, held = hold_out(image_set([30], labelled=False), 0.1, seed=0)
    assert (len(train), len(held)) == (27, 3)
    assert held.labels is None


def test_a_class_that_would_not_be_trained_on_is_named():
    with pytest.raises(UsageError, match=r"data\.validation: 0\.5 of class b's 1 images leaves none"):
        hold_out(image_set([8, 1]), 0.5, seed=0)
