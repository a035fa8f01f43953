"""What the loss of whole batches (test_adamatch.py) does not show, against numbers worked out by hand."""

import math

import pytest
import torch
from torch import tensor

from cbda.adaptation.losses import (
    Alignment,
    aligned,
    masked_cross_entropy,
    ramp,
)


def test_a_class_that_the_target_never_says_is_not_divided_by_zero():
    labels = aligned(tensor([[1.0, 0.0]]), tensor([0.5, 0.5]), tensor([1.0, 0.0]))
    assert labels.tolist() == [[1.0, 0.0]]


LOGITS = tensor([[math.log(3.0), 0.0], [0.0, math.log(4.0)], [0.0, 0.0]])  # probabilities 3/4, 1/5, 1/2 of class 0


def test_where_no_label_passes_the_loss_is_0():
    assert masked_cross_entropy(LOGITS, torch.full((3, 2), 0.5), tensor([False] * 3)).item() == 0


def test_soft_labels_that_do_not_sum_to_one_have_tensorflows_value_and_gradient():
    logits, labels = (LOGITS - 30).requires_grad_(), tensor([[0.9, 0.5], [0.8, 0.2], [0.6, 0.4]])
    loss = masked_cross_entropy(logits, labels, tensor([True, False, False]), "soft")
    assert loss.item() == pytest.approx((0.9 * math.log(4 / 3) + 0.5 * math.log(4)) / 3)
    loss.backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, tensor([[0.75 - 0.9, 0.25 - 0.5], [0.0, 0.0], [0.0, 0.0]]) / 3)


def test_mu_warms_up_over_half_the_run():
    for progress, mu in ((0.0, 0.0), (0.125, 0.5 - math.sqrt(0.125)), (0.25, 0.5), (0.5, 1.0), (0.9, 1.0)):
        assert ramp(progress, 0.5) == pytest.approx(mu)
        assert ramp(progress, 0.5) == pytest.approx(0.5 - math.cos(min(math.pi, 2 * math.pi * progress)) / 2)
        assert ramp(progress, 0.0) == 1.0


def test_running_estimates_counted_by_hand():
    alignment = Alignment(2, decay=0.9, history=3)
    means = [tensor([1.0, 0.0]), tensor([0.8, 0.2]), tensor([0.6, 0.4]), tensor([0.0, 1.0])]
    wanted = 0.5
    for number, mean in enumerate(means):
        found = alignment(mean, mean)
        wanted = 0.9 * wanted + 0.1 * mean[0].item()
        last = ([0.5, 0.5, 0.5] + [m[0].item() for m in means[: number + 1]])[-3:]
        assert found[0].tolist() == pytest.approx([wanted, 1 - wanted])
        assert found[1].tolist() == pytest.approx([sum(last) / 3, 1 - sum(last) / 3])
    again = Alignment(2, decay=0.9, history=3)
    again.load_state_dict(alignment.state_dict())  # a resumed run goes on from there
    for ours, theirs in zip(again(means[0], means[1]), alignment(means[0], means[1]), strict=True):
        assert torch.equal(ours, theirs)
