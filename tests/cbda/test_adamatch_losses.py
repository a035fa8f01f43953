"""Each part of the method against numbers worked out by hand."""

import math

import pytest
import torch
from torch import tensor

from cbda.adaptation.losses import (
    Alignment,
    aligned,
    batch_mean,
    interpolated,
    masked_cross_entropy,
    ramp,
    relative_threshold,
)


def test_interpolation_is_entry_by_entry():
    together, alone = tensor([[0.0, 10.0], [1.0, -1.0]]), tensor([[4.0, 20.0], [1.0, 3.0]])
    share = tensor([[0.0, 0.5], [0.9, 0.25]])
    assert torch.equal(interpolated(together, alone, share), tensor([[0.0, 15.0], [1.0, 0.0]]))


def test_the_threshold_is_relative_to_the_sources_mean_confidence_and_has_no_gradient():
    probabilities = tensor([[0.5, 0.5], [0.1, 0.9], [1.0, 0.0]], requires_grad=True)
    threshold = relative_threshold(probabilities, 0.9)
    assert threshold.item() == pytest.approx(0.9 * (0.5 + 0.9 + 1.0) / 3)
    assert not threshold.requires_grad
    mean = batch_mean(probabilities)
    assert mean.tolist() == pytest.approx([1.6 / 3, 1.4 / 3])
    assert not mean.requires_grad


def test_alignment_moves_pseudo_labels_towards_the_wanted_distribution():
    # The target says class 0 twice as often as the source has it: 0.6 and 0.4 become 0.3 : 0.8.
    labels = aligned(tensor([[0.6, 0.4]], requires_grad=True), tensor([0.25, 0.5]), tensor([0.5, 0.25]))
    assert labels[0].tolist() == pytest.approx([0.3 / 1.1, 0.8 / 1.1], rel=1e-5)
    assert not labels.requires_grad


def test_a_class_that_the_target_never_says_is_not_divided_by_zero():
    labels = aligned(tensor([[1.0, 0.0]]), tensor([0.5, 0.5]), tensor([1.0, 0.0]))
    assert labels.tolist() == [[1.0, 0.0]]


def test_labels_scaled_as_on_the_page_of_keras_pass_more_easily():
    third = tensor([[0.36, 0.34, 0.30]])
    even = torch.full((3,), 1 / 3)
    assert aligned(third, even, even)[0].tolist() == pytest.approx([0.36, 0.34, 0.30])
    norm = math.sqrt(0.36**2 + 0.34**2 + 0.30**2)
    assert aligned(third, even, even, "l2")[0].tolist() == pytest.approx([0.36 / norm, 0.34 / norm, 0.30 / norm])


LOGITS = tensor([[math.log(3.0), 0.0], [0.0, math.log(4.0)], [0.0, 0.0]])  # probabilities 3/4, 1/5, 1/2 of class 0


def test_hard_labels_count_what_passes_over_all():
    labels, mask = tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4]]), tensor([True, True, False])
    loss = masked_cross_entropy(LOGITS, labels, mask)
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(5)) / 3)
    assert masked_cross_entropy(LOGITS, labels, tensor([False] * 3)).item() == 0


def test_soft_labels_are_the_cross_entropy_of_distributions():
    labels, mask = tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4]]), tensor([True, False, True])
    want = 0.9 * math.log(4 / 3) + 0.1 * math.log(4) + math.log(2)
    assert masked_cross_entropy(LOGITS, labels, mask, "soft").item() == pytest.approx(want / 3)


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
