"""What a step's losses are made of: classes, augmentation, penalty; and what they show."""

import math
from typing import Any

import pytest
import torch
from tasks import made
from torch.nn.functional import softplus

import cbgan.task
from cbgan.collapse import has_few_images, has_stalled, has_won, verdict_gap
from cbgan.config import GanConfig
from cbgan.networks.augmentation import augment
from cbgan.networks.dcgan import Generator
from cbgan.noise import noise
from cbgan.task import GanTask, gradient_variances
from common.data import DataConfig
from common.data.image_set import to_float
from common.norms.config import NormConfig
from common.runtime.seeding import generator
from common.train.guard import StepGuard
from common.train.step import MicroBatch, Step

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


def started(**options: Any) -> tuple[GanTask, MicroBatch, Step]:
    """Return a task, its first step, and that step's micro-batch."""
    task = made(GanTask, GanConfig(**{**SMALL, **options}))
    guard = StepGuard(task.networks.values(), ["loss/d", "loss/g"], CPU)
    step = Step(task.new_state(), guard, next(task.loader.epoch(0, 0, task.cfg.seed)), task.cfg)
    guard.begin(1)
    return task, step.micro_batches[0], step


def test_each_loss_sees_the_right_images_their_classes_and_its_own_noise():
    task, micro, _ = started(norm=BY_CLASS)
    g, d = task.networks["g"], task.networks["d"]
    labels, z = micro["train"].labels, noise(task.cfg, 0, 32, CPU)
    assert len(labels.unique()) > 3
    real = d(to_float(micro["train"].images), labels)
    fake = d(g(z[:16], labels).detach(), labels)
    want = softplus(-real).mean() + softplus(fake).mean()
    loss, metrics = task.discriminator_loss(micro)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is None for p in g.parameters())  # the discriminator's half does not train the generator
    assert task.generator_loss(micro).item() == pytest.approx(
        softplus(-d(g(z[16:], labels), labels)).mean().item(), rel=1e-5
    )
    assert metrics.step["discriminator/real"].item() == pytest.approx(real.sigmoid().mean().item(), rel=1e-5)
    assert metrics.step["discriminator/fake"].item() == pytest.approx(fake.sigmoid().mean().item(), rel=1e-5)


def test_r1_is_half_gamma_times_the_penalty_on_real_images_alone(monkeypatch):
    task, micro, _ = started(r1=3.0)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def penalty(logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        seen.append((logits, images))
        return logits.sum() * 0 + 7.0

    plain, _, _ = started()
    without, unpenalised = plain.discriminator_loss(micro)
    monkeypatch.setattr(cbgan.task, "gradient_penalty", penalty)
    loss, metrics = task.discriminator_loss(micro)
    assert loss.item() == pytest.approx(without.item() + 1.5 * 7.0, rel=1e-5)
    ((logits, images),) = seen
    assert torch.equal(images, to_float(micro["train"].images))
    assert logits.shape == (16,)
    assert metrics.step["loss/r1"].item() == pytest.approx(10.5)
    assert "loss/r1" not in unpenalised.step


def test_the_hinge_reaches_both_losses():
    task, micro, _ = started(loss="hinge")
    with torch.no_grad():
        for parameter in task.networks["d"].parameters():
            parameter.zero_()
        task.networks["d"].get_parameter("linear.bias").fill_(0.25)
    assert task.discriminator_loss(micro)[0].item() == pytest.approx(0.75 + 1.25)
    assert task.generator_loss(micro).item() == pytest.approx(-0.25)


def test_augmentation_changes_all_that_the_discriminator_sees_each_by_draws_of_its_own(monkeypatch):
    kinds = ["color", "cutout"]
    task, micro, _ = started(augment=kinds, norm=NormConfig(kind="bn"))
    seen: list[torch.Tensor] = []
    task.networks["d"].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    task.discriminator_loss(micro)
    task.generator_loss(micro)
    z, g = noise(task.cfg, 0, 32, CPU), task.networks["g"]
    with torch.no_grad():
        shown = {"real": to_float(micro["train"].images), "fake": g(z[:16]), "generator": g(z[16:])}
    for found, (whose, images) in zip(seen, shown.items(), strict=True):
        want = augment(images, kinds, generator(task.cfg.seed, "augment", whose, 0, micro.number))
        torch.testing.assert_close(found, want)
    other = MicroBatch(micro.batches, micro.number + 1, micro.seed)
    task.discriminator_loss(other)
    assert not torch.equal(seen[3], seen[0])


def test_a_step_logs_variances_of_gradients_with_the_line_they_belong_to():
    task, _, step = started(log_every=1)
    metrics = task.train_step(step)
    for name in ("d", "g"):
        found = [p.grad.numpy().var() for p in task.networks[name].parameters() if p.grad is not None and p.numel() > 1]
        assert len(found) > 5
        assert metrics.step[f"gradient/{name}_variance"].item() == pytest.approx(sum(found) / len(found), rel=1e-4)
        assert metrics.step[f"gradient/{name}_variance_max"].item() == pytest.approx(max(found), rel=1e-4)
    g = task.networks["g"]
    assert isinstance(g, Generator)
    outside = [p for layer in (g.linear, g.deconv1, g.deconv2, g.deconv3, g.norm3, g.deconv4)
               for p in layer.parameters()]  # fmt: skip
    shared = [p.grad.numpy().var() for p in outside if p.grad is not None and p.numel() > 1]
    assert len(outside) < len(list(g.parameters()))
    assert metrics.step["gradient/g_variance_shared"].item() == pytest.approx(sum(shared) / len(shared), rel=1e-4)
    assert {"discriminator/real", "discriminator/fake", "loss/d", "loss/g"} <= metrics.step.keys()
    task, _, step = started(log_every=2)
    metrics = task.train_step(step)  # the first of two
    assert not any("variance" in name for name in metrics.step)
    assert gradient_variances({"none": torch.nn.Linear(2, 2)}) == {}


def test_a_discriminator_has_won_when_its_loss_without_the_penalty_is_0():
    assert has_won({"loss/d": 2e-3}) is None
    assert "0.0005" in (has_won({"loss/d": 2e-3, "loss/r1": 1.5e-3}) or "")
    assert "0.0009" in (has_won({"loss/d": 9e-4}) or "")


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
        cause = has_stalled({"discriminator/gap": between})
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
        found = has_few_images(values, before)
        assert found is None if cause is None else cause in (found or ""), (values, before)


def test_its_detectors_ask_with_what_was_measured_before():
    task = started()[0]
    task.evaluator.most = {"metric/diversity": 0.9}
    found = [d.find({"metric/diversity": math.ulp(0.0)}) for d in task.detectors if d.reads == "evaluation"]
    assert [cause for cause in found if cause is not None and "was 0.9" in cause]
    assert [d.find({"loss/d": 0.0}) is None for d in task.detectors if d.reads == "steps"] == [False]
