"""A trained resnet18 that is converted, measured, fitted again and converted back; see test_norms_convert.py first."""

import copy

import pytest
import torch
from norm_cases import CLUSTERED
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torchvision.models import resnet18

from common.norms import clusters, collect_health, convert_norms, recalibrate, revert_norms

pytestmark = pytest.mark.full
TRAINED = 1297


@pytest.fixture(scope="module")
def digits():
    pixels, target = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    images = F.interpolate(images, 16, mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(target)[order]


@pytest.fixture(scope="module")
def trained(digits):
    """Return a resnet18 trained on digits until its batch statistics have settled."""
    images, labels = digits
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = resnet18(num_classes=10)
        steps, size = 150, 48
        optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            part = (torch.arange(size) + step * size) % TRAINED
            loss = F.cross_entropy(model(images[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@pytest.fixture
def model(trained):
    return copy.deepcopy(trained)


@torch.no_grad()
def logits(model, digits):
    return model.eval()(digits[0][TRAINED:])


def accuracy(out, digits):
    return float((out.argmax(1) == digits[1][TRAINED:]).float().mean())


def off(out, want):
    return float(((out - want).square().mean() / want.square().mean()).sqrt())


@torch.no_grad()
def information(model, digits):
    model.train()
    with collect_health(model) as found:
        model(digits[0][:200])
    return min(state.information for state in found.values())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ucb", {"num_components": 2}),
        ("mn", {}),
        ("scb", {"statistics": "batch"}),
        ("ucb", {"num_components": 5, "scale": "sqrt_k"}),
        ("ucb", {"groups": 1}),
        ("dsbn", {}),
    ],
    ids=str,
)
def test_conversion_keeps_what_a_model_has_learned_and_reverting_restores_it(trained, model, digits, kind, options):
    want = logits(trained, digits)
    assert accuracy(want, digits) > 0.95
    convert_norms(model, kind, **options)
    with clusters(torch.zeros(500, dtype=torch.long) if kind in CLUSTERED else None):
        found = logits(model, digits)
    # Training ends elsewhere with each machine and number of threads. With eight seeds 0 to 7 of 500 images were lost,
    # and logits were off by 0.07 to 0.15; lost statistics leave them off by hundreds, and 9 of 10 images wrong.
    assert accuracy(found, digits) >= accuracy(want, digits) - (0.03 if kind in ("mn", "ucb") else 0.01)
    assert off(found, want) <= (0.25 if kind in ("mn", "ucb") else 1e-4)
    if kind in ("mn", "ucb"):
        assert off(found, want) > 1e-3  # a mixture, not BatchNorm again
    if kind == "ucb":
        # 0.048 to 0.065 and, jointly, 0.018 to 0.091 with those seeds; 0 where components have fallen together.
        assert information(model, digits) >= (0.03 if model.bn1.groups > 1 else 0.01)
    revert_norms(model)
    assert torch.equal(logits(model, digits), want)


def test_a_converted_mixture_stays_a_mixture_in_training_and_when_fitted(model, digits):
    convert_norms(model, "ucb", num_components=3)
    before = accuracy(logits(model, digits), digits)
    twin = copy.deepcopy(model).train()
    with torch.no_grad():
        for step in range(50):
            twin(digits[0][(torch.arange(48) + 48 * step) % TRAINED])
    assert information(twin, digits) >= 0.03  # see above
    assert len(recalibrate(model, list(digits[0][:480].split(120)))) == 20
    assert accuracy(logits(model, digits), digits) >= before - 0.02
    assert information(model, digits) >= 0.05
