import itertools
import math

import pytest
import torch

from common.metrics.features import quality
from common.metrics.features.quality import inception_score, kernel_distance, precision_recall


def features(count: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed)) + shift


def test_the_kernel_distance_of_all_images_is_the_unbiased_estimate_written_out():
    fake, real = features(12, 0, 0.5), features(12, 1)

    def mean(pairs) -> float:
        return sum((float(x.double() @ y.double()) / 5 + 1) ** 3 for x, y in pairs) / len(pairs)

    want = mean(list(itertools.permutations(fake, 2))) + mean(list(itertools.permutations(real, 2)))
    want -= 2 * mean(list(itertools.product(fake, real)))
    assert kernel_distance(fake, real) == pytest.approx(want, rel=1e-4)  # theirs is in single precision


def test_the_kernel_distance_takes_subsets_of_the_fewer_images(monkeypatch):
    """The mean over a hundred subsets of the larger set is near that of all, which no single one is."""
    fake, real = features(40, 0, 1.0), features(400, 1)
    every = [kernel_distance(fake, part) for part in real.split(40)]
    assert kernel_distance(fake, real) == pytest.approx(sum(every) / 10, rel=0.1)
    monkeypatch.setattr(quality, "KID_SIZE", 10)
    assert kernel_distance(fake, real) == pytest.approx(sum(every) / 10, rel=0.2)


def test_the_inception_score_of_certain_and_of_undecided_classifiers():
    certain = torch.eye(4).repeat(10, 1) * 100
    assert inception_score(torch.zeros(40, 4)) == pytest.approx(1)
    whole = inception_score(certain.repeat(50, 1))
    assert 3.8 < whole < 4  # four classes, drawn unevenly by the ten parts
    assert inception_score(certain[:3]) == pytest.approx(1)  # a part each, of one image


def test_precision_and_recall_by_hand():
    """On a line: real images 0, 1, ... 9, whose third neighbours are 3, 2, 2, ... 2, 3 away; and the other way."""
    real = torch.arange(10.0)[:, None]
    fake = torch.tensor([[-3.0], [-3.5], [4.4], [4.5], [12.0], [12.5]])
    precision, recall = precision_recall(fake, real)
    assert precision == pytest.approx(4 / 6)  # -3.5 and 12.5 are outside
    # third neighbours among the generated: of -3.5 at 8, of -3 at 7.5, of 4.4 at 7.6, of 4.5 at 7.5, of 12 at 7.6, ...
    assert recall == pytest.approx(1)
    assert precision_recall(fake[2:4].repeat(2, 1), real) == (1.0, pytest.approx(0.0))


def test_precision_and_recall_of_too_few_images_are_refused():
    with pytest.raises(ValueError, match="expected more than 3 images of either kind, got 3"):
        precision_recall(features(3, 0), features(9, 1))


def test_precision_and_recall_draw_at_most_so_many_of_either(monkeypatch):
    monkeypatch.setattr(quality, "MOST", 30)
    fake = torch.cat([features(30, 0), features(30, 1, 100.0)])  # half of them far away, in the rear
    precision, recall = precision_recall(fake, features(60, 2))
    assert 0.2 < precision < 0.8
    assert 0.2 < recall <= 1
    assert not math.isclose(precision, recall_of_all := precision_recall(fake[:30], features(60, 2))[0])
    assert recall_of_all > 0.6
