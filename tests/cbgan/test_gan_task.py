"""What a step's losses are made of: classes, augmentation, penalty; and what they show."""

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.nn.functional import softplus

import cbgan.objective
from cbgan.config import GanConfig
from cbgan.networks.augmentation import augment
from cbgan.networks.dcgan import Generator
from cbgan.noise import noise
from cbgan.objective import Objective, collapse_of_losses, collapse_of_values, gradient_variances, verdict_gap
from cbgan.train import Gan
from common.data import DataConfig
from common.data.image_set import to_float
from common.norms.config import NormConfig
from common.runtime.distributed import Env
from common.runtime.seeding import generator
from common.train.guard import Part, StepGuard, Update
from common.train.setup import prepare

CPU = torch.device("cpu")
SMALL = {
    "width": 8,
    "latent_dim": 4,
    "batch_size": 16,
    "data": DataConfig(size=8),
    "loss": "logistic",
    "spectral": False,
    "augment": ["none"],
}
BY_CLASS = NormConfig(kind="scb", num_components=10)


def started(**options: Any) -> tuple[Gan, Part, Update]:
    """Return a method with its networks, and the first part of its first step."""
    cfg = GanConfig(**{**SMALL, **options})
    method, feed, parts = prepare(Gan, cfg, Gan.load(cfg), CPU, Env())
    guard = StepGuard(parts.networks.values(), ["loss/d", "loss/g"], CPU)
    update = Update(parts, guard, next(feed.epoch(0, 0, cfg.seed)), CPU, "fp32", None)
    guard.begin(1)
    assert isinstance(method, Gan)
    return method, update.parts[0], update


def test_a_conditional_gan_tells_both_networks_the_classes_of_the_real_images():
    method, part, _ = started(norm=BY_CLASS)
    g, d = method.networks["g"], method.networks["d"]
    labels, z = part["train"].labels, noise(method.cfg, 0, 32, CPU)
    assert len(labels.unique()) > 3
    real = d(to_float(part["train"].images), labels)
    fake = d(g(z[:16], labels).detach(), labels)
    want = softplus(-real).mean() + softplus(fake).mean()
    objective = Objective(method)
    assert objective.discriminator(part).item() == pytest.approx(want.item(), rel=1e-5)
    assert objective.generator(part).item() == pytest.approx(
        softplus(-d(g(z[16:], labels), labels)).mean().item(), rel=1e-5
    )
    shown = objective.shown()
    assert shown["discriminator/real"].item() == pytest.approx(real.sigmoid().mean().item(), rel=1e-5)
    assert shown["discriminator/fake"].item() == pytest.approx(fake.sigmoid().mean().item(), rel=1e-5)
    assert not any(value.requires_grad for value in shown.values())


def test_what_is_shown_is_the_mean_over_parts():
    method, part, _ = started()
    objective = Objective(method)
    objective.discriminator(part)
    one = objective.shown()["discriminator/real"].item()
    with torch.no_grad():
        method.networks["d"].get_parameter("linear.bias").fill_(50)  # sure that all is real
    objective.discriminator(part)
    assert objective.shown()["discriminator/real"].item() == pytest.approx((one + 1) / 2, abs=1e-4)


def test_r1_is_half_gamma_times_the_penalty_on_real_images_alone(monkeypatch):
    method, part, _ = started(r1=3.0)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def penalty(logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        seen.append((logits, images))
        return logits.sum() * 0 + 7.0

    plain, _, _ = started()
    without = Objective(plain).discriminator(part)
    monkeypatch.setattr(cbgan.objective, "gradient_penalty", penalty)
    objective = Objective(method)
    assert objective.discriminator(part).item() == pytest.approx(without.item() + 1.5 * 7.0, rel=1e-5)
    ((logits, images),) = seen
    assert torch.equal(images, to_float(part["train"].images))
    assert logits.shape == (16,)
    assert objective.shown()["loss/r1"].item() == pytest.approx(10.5)
    assert "loss/r1" not in Objective(plain).shown()


def test_the_hinge_reaches_both_losses():
    method, part, _ = started(loss="hinge")
    with torch.no_grad():
        for parameter in method.networks["d"].parameters():
            parameter.zero_()
        method.networks["d"].get_parameter("linear.bias").fill_(0.25)
    assert Objective(method).discriminator(part).item() == pytest.approx(0.75 + 1.25)
    assert Objective(method).generator(part).item() == pytest.approx(-0.25)


def test_augmentation_changes_all_that_the_discriminator_sees_each_by_draws_of_its_own(monkeypatch):
    kinds = ["color", "cutout"]
    method, part, _ = started(augment=kinds, norm=NormConfig(kind="bn"))
    seen: list[torch.Tensor] = []
    method.networks["d"].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    objective = Objective(method)
    objective.discriminator(part)
    objective.generator(part)
    z, g = noise(method.cfg, 0, 32, CPU), method.networks["g"]
    with torch.no_grad():
        shown = {"real": to_float(part["train"].images), "fake": g(z[:16]), "generator": g(z[16:])}
    for found, (whose, images) in zip(seen, shown.items(), strict=True):
        want = augment(images, kinds, generator(method.cfg.seed, "augment", whose, 0, part.number))
        torch.testing.assert_close(found, want)
    other = Part(part.batches, part.number + 1, part.seed)
    objective.discriminator(other)
    assert not torch.equal(seen[3], seen[0])


def test_a_step_logs_variances_of_gradients_with_the_line_they_belong_to():
    method, _, update = started(log_every=1)
    method.step(update)
    for name in ("d", "g"):
        found = [
            p.grad.numpy().var() for p in method.networks[name].parameters() if p.grad is not None and p.numel() > 1
        ]
        assert len(found) > 5
        assert update.values[f"gradient/{name}_variance"].item() == pytest.approx(sum(found) / len(found), rel=1e-4)
        assert update.values[f"gradient/{name}_variance_max"].item() == pytest.approx(max(found), rel=1e-4)
    g = method.networks["g"]
    assert isinstance(g, Generator)
    outside = [p for layer in (g.linear, g.deconv1, g.deconv2, g.deconv3, g.norm3, g.deconv4)
               for p in layer.parameters()]  # fmt: skip
    shared = [p.grad.numpy().var() for p in outside if p.grad is not None and p.numel() > 1]
    assert len(outside) < len(list(g.parameters()))
    assert update.values["gradient/g_variance_shared"].item() == pytest.approx(sum(shared) / len(shared), rel=1e-4)
    assert {"discriminator/real", "discriminator/fake", "loss/d", "loss/g"} <= update.values.keys()
    method, _, update = started(log_every=2)
    method.step(update)  # the first of two
    assert not any("variance" in name for name in update.values)
    assert gradient_variances({"none": torch.nn.Linear(2, 2)}) == {}


def test_a_discriminator_has_won_when_its_loss_without_the_penalty_is_0():
    assert collapse_of_losses({"loss/d": 2e-3}) is None
    assert "0.0005" in (collapse_of_losses({"loss/d": 2e-3, "loss/r1": 1.5e-3}) or "")
    assert "0.0009" in (collapse_of_losses({"loss/d": 9e-4}) or "")


def test_verdicts_are_compared_over_the_last_300_steps():
    def gap(gaps: dict[int, float], start: int = 0) -> float | None:
        lines = [{"step": t, "discriminator/real": 0.5 + d / 2, "discriminator/fake": 0.5 - d / 2}
                 for t, d in gaps.items()]  # fmt: skip
        found = verdict_gap([{"step": 0, "metric/diversity": 1.0}, *lines, {"step": max(gaps), "health/x": 0}], start)
        return found.get("discriminator/gap")

    assert gap(dict.fromkeys(range(10, 300, 10), 0.0)) is None  # a new discriminator knows nothing yet
    assert gap(dict.fromkeys(range(10, 310, 10), 0.0)) == pytest.approx(0)
    assert gap({t: 1.0 if t <= 100 else t / 1000 for t in range(100, 500, 100)}) == pytest.approx(0.3)
    assert gap({1000: 0.1, 2000: 0.2}) == pytest.approx(0.2)  # a line may be the mean of more steps
    rewound = dict.fromkeys(range(10, 410, 10), 0.0)
    assert gap(rewound, start=110) is None
    assert gap(rewound, start=100) == pytest.approx(0)
    for between, stalled in ((2.9e-3, True), (-2.9e-3, True), (3.1e-3, False), (-0.1, False)):
        cause = collapse_of_values({"discriminator/gap": between}, {})
        assert (cause is not None and cause.startswith("the discriminator gives real and generated")) == stalled


def test_what_a_measurement_says_of_a_collapse():
    for values, before, cause in (
        ({"health/norm1/usage_min": 1.1e-3}, {}, None),
        ({"health/norm1/usage_min": 9e-4, "health/norm2/usage_min": 0.3}, {}, "norm1 holds 0.09 %"),
        ({"health/norm1/information": 0.0}, {}, None),
        ({"metric/diversity": 0.24}, {"metric/diversity": 1.0}, "diversity of samples is 0.24, was 1"),
        ({"metric/diversity": 0.26}, {"metric/diversity": 1.0}, None),
        ({"metric/diversity": 0.0}, {"metric/diversity": 0.19}, None),  # it never was different
        ({"metric/diversity": 0.0}, {}, None),
        ({"metric/recall_classifier": 0.1}, {"metric/recall_classifier": 0.5}, "recall classifier of samples is 0.1"),
        ({"metric/fid_classifier": 0.0}, {"metric/fid_classifier": 1.0}, None),
    ):
        found = collapse_of_values(values, before)
        assert found is None if cause is None else cause in (found or ""), (values, before)


def test_a_method_asks_with_what_was_measured_before():
    gan = Gan(GanConfig(), {}, CPU)
    gan.evaluation = cast(Any, SimpleNamespace(most={"metric/diversity": 0.9}))
    assert "was 0.9" in (gan.collapse_measured({"metric/diversity": math.ulp(0.0)}) or "")
