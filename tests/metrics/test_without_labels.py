import math

import pytest
import torch
from torch import tensor

from common.metrics.logits import classify
from common.metrics.scores import information, neighbourhood_density


def test_information_is_what_is_known_of_the_class():
    sure = 50 * torch.eye(4)
    assert information(sure) == pytest.approx(math.log(4))  # each image its own class
    assert information(sure[[0, 0, 0]]) == pytest.approx(0, abs=1e-9)  # all of one class: collapsed
    assert information(torch.zeros(5, 3)) == pytest.approx(0, abs=1e-9)  # nothing known
    # Two images, (1/2, 1/2) and (1, 0): H(3/4, 1/4) - (log 2 + 0) / 2.
    mean = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert information(tensor([[0.0, 0.0], [50.0, 0.0]])) == pytest.approx(mean - math.log(2) / 2)


def test_density_counts_the_neighbours_that_agree():
    # Each image has two others of its class and three of the other, at similarity 1 and 0.
    two = 50 * torch.eye(2)[[0, 0, 0, 1, 1, 1]]
    weights = [math.exp(20)] * 2 + [1.0] * 3
    shares = [w / sum(weights) for w in weights]
    assert neighbourhood_density(two) == pytest.approx(-sum(p * math.log(p) for p in shares))
    assert neighbourhood_density(torch.zeros(2000, 3)) == pytest.approx(math.log(1999))
    with pytest.raises(ValueError, match="logits: expected at least 2 images, got 1"):
        neighbourhood_density(torch.zeros(1, 3))


def test_logits_come_in_the_order_of_the_images_and_the_last_batch_is_smaller():
    images, asked, sizes = torch.arange(10).reshape(10, 1, 1, 1).to(torch.uint8), [], []

    def classifier(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        return torch.cat([batch.flatten(1).float(), -batch.flatten(1).float()], 1)

    found = classify(classifier, images, 2, batch_size=4, go_on=lambda: asked.append(1))
    assert found.dtype == torch.float64
    assert found[:, 0].tolist() == list(range(10))
    assert found[:, 1].tolist() == [-i for i in range(10)]
    assert (sizes, len(asked)) == ([4, 4, 2], 3)
