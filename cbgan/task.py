"""The GAN that is trained: its two losses, how its generator is evaluated, and how it may collapse."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor, nn

from cbgan.collapse import collapse_detectors
from cbgan.config import GanConfig
from cbgan.evaluation import Evaluator, fid_series, recalibrate, uncertainty_rows
from cbgan.models import build_networks
from cbgan.networks.augmentation import augment
from cbgan.networks.dcgan import UNDER_TEST, Generator
from cbgan.networks.losses import discriminator_loss, generator_loss, gradient_penalty
from cbgan.noise import noise
from common.data import ImageSet
from common.metrics.fid import other_split
from common.metrics.gradient_variance import variances
from common.norms import preserved_statistics
from common.runtime.errors import UsageError
from common.runtime.seeding import generator
from common.train.logging import FINAL
from common.train.optim import parameter_groups
from common.train.step import Metrics, MicroBatch, Step
from common.train.task import Better, EvalContext, SelectionMetric, Task, TrainContext


class GanTask(Task[GanConfig]):
    """A GAN: a step updates the discriminator, then the generator, on one batch of real images.

    chainer-gan-lib, which the recipe follows otherwise, updates the generator first, on the same generated images.
    """

    application = "cbgan"
    config = GanConfig

    def __init__(self, cfg: GanConfig, images: Mapping[str, ImageSet], context: TrainContext) -> None:
        super().__init__(cfg, images, context, lambda: build_networks(cfg), evaluated=("g",))
        self.optimizers = {
            name: torch.optim.Adam(
                parameter_groups(network, cfg.weight_decay), lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True
            )
            for name, network in self.networks.items()
        }
        measured = replace(cfg, evaluate_every=0) if context.dry_run else cfg  # a dry run evaluates nothing
        self.evaluator = Evaluator(measured, images, self.device, context.should_stop, self.env)
        self.detectors = collapse_detectors(lambda: self.evaluator.most)

    @classmethod
    def selection_metrics(cls, cfg: GanConfig) -> dict[str, SelectionMetric]:
        """Return the FID against the reference images, then that against the others."""
        other, tag = other_split(cfg.fid.reference), f"metric/fid_{cfg.fid.extractor}"
        return {tag: SelectionMetric(cfg.fid.reference, "lower"), f"{tag}_{other}": SelectionMetric(other, "lower")}

    @classmethod
    def load_images(cls, cfg: GanConfig) -> dict[str, ImageSet]:
        """Return the images; a conditional GAN's have labels, of as many classes as its layers have clusters."""
        images = super().load_images(cfg)
        if cfg.conditional and (found := images["train"].num_classes) != cfg.norm.num_components:
            what = f"{cfg.data.name} has {found} classes" if found else f"the images of {cfg.data.name} have no labels"
            hint = f"--norm.num_components {found}" if found else "a norm.kind without clusters, such as ucb"
            raise UsageError(
                f"norm.num_components: {cfg.norm.kind} takes the classes as clusters, and {what}; expected {hint}, got "
                f"{cfg.norm.num_components}"
            )
        return images

    def train_step(self, step: Step) -> Metrics:
        """Update the discriminator, then the generator."""
        metrics = step.optimize("d", self.discriminator_loss) | step.optimize("g", self.generator_loss, frozen=["d"])
        if (step.micro_batches[-1].number + 1) % (self.cfg.log_every * self.cfg.grad_accum_steps) == 0:
            metrics |= Metrics(gradient_variances(self.networks))
        return metrics

    def discriminator_loss(self, micro: MicroBatch) -> tuple[Tensor, Metrics]:
        """Return its loss on real images and on ones that the generator, which is not trained by it, makes.

        A conditional GAN's generated images are asked for the classes of the real ones beside them, so that classes are
        as frequent among them.
        """
        cfg, labels = self.cfg, self._labels(micro)
        real = self.to_input(micro["train"].images).requires_grad_(cfg.r1 > 0)
        with torch.no_grad():
            fake = self.networks["g"](self._noise(micro)[0], *labels)
        d = self.ddp_networks["d"]
        of_real = d(self._augmented(real, micro, "real"), *labels)
        of_fake = d(self._augmented(fake, micro, "fake"), *labels)
        metrics = {
            "discriminator/real": of_real.float().sigmoid().mean(),
            "discriminator/fake": of_fake.float().sigmoid().mean(),
        }
        loss = discriminator_loss(of_real, of_fake, cfg.loss)
        if cfg.r1:
            metrics["loss/r1"] = cfg.r1 / 2 * gradient_penalty(of_real, real)
            loss = loss + metrics["loss/r1"]
        return loss, Metrics(metrics)

    def generator_loss(self, micro: MicroBatch) -> Tensor:
        """Return its loss by the discriminator's verdict, on noise of its own.

        The discriminator is not wrapped for several ranks: none of its gradients are computed, or averaged.
        """
        labels = self._labels(micro)
        fake = self.ddp_networks["g"](self._noise(micro)[1], *labels)
        return generator_loss(self.networks["d"](self._augmented(fake, micro, "generator"), *labels), self.cfg.loss)

    def _labels(self, micro: MicroBatch) -> tuple[Tensor, ...]:
        return (micro["train"].labels,) if self.cfg.conditional else ()

    def _noise(self, micro: MicroBatch) -> tuple[Tensor, ...]:
        """Draw the generator's inputs, for the discriminator's update and for its own."""
        rows = 2 * len(micro["train"].images)
        return noise(self.cfg, micro.number, rows, self.device, self.env.rank, micro.seed).chunk(2)

    def _augmented(self, images: Tensor, micro: MicroBatch, whose: str) -> Tensor:
        if self.cfg.augment in ([], ["none"]):
            return images
        place = ("augment", whose, self.env.rank, micro.number)
        return augment(images, self.cfg.augment, generator(micro.seed, *place, device=self.device))

    def should_evaluate(self, epoch: int) -> bool:
        """Say so every ``evaluate_every`` epochs, before the first and at the end; without FID, only draw."""
        every = self.cfg.evaluate_every or self.cfg.checkpoint_every
        return (epoch % every == 0 or epoch == self.cfg.epochs) and bool(epoch or self.cfg.evaluate_every)

    def recalibrate(self, name: str, network: nn.Module, go_on: Callable[[], None]) -> None:
        """Estimate the generator's statistics from samples."""
        recalibrate(self.cfg, network, self.evaluator.class_counts(), self.device, go_on)

    def evaluate(self, networks: Mapping[str, nn.Module], context: EvalContext) -> dict[str, float]:
        """Measure the generator, as trained too where its average is what is measured, and draw what it makes."""
        g, raw = networks["g"], self.networks["g"]
        assert isinstance(g, Generator)
        assert isinstance(raw, Generator)
        if raw is g:
            return self.evaluator.run(g, context)
        with preserved_statistics(raw):
            self.recalibrate("g", raw, context.go_on)
            return self.evaluator.run(g, context, raw)

    def probe(self, networks: Mapping[str, nn.Module], step: int) -> None:
        """Generate a batch in training mode."""
        z = noise(self.cfg, step, self.cfg.batch_size, self.device, self.env.rank)
        networks["g"](z, self.evaluator.labels(len(z)))

    def better(self) -> Mapping[str, Better]:
        """Return it of what is measured; the losses of a game have no best, nor has diversity, of which 1 is real."""
        fid = self.evaluator.fid
        if fid is None:
            return {}
        of_samples: dict[str, Better] = {**fid.better(), "metric/classes_found": "higher"}
        final: dict[str, Better] = {f"{tag}{FINAL}": way for tag, way in of_samples.items()}
        return {**of_samples, **final, f"{fid.tag}_raw": "lower", "metric/class_accuracy": "higher"}

    def eval_protocol(self) -> dict[str, object]:
        """Return what a FID of this run is comparable by."""
        return {**super().eval_protocol(), **self.evaluator.protocol()}

    def check_protocol(self, before: Mapping[str, object]) -> None:
        """Take a classifier trained anew, on another machine, for the one the run has been measured by."""
        known = dict(before)
        if self.cfg.fid.extractor == "classifier":
            self.evaluator.note_extractor(known.pop("extractor_id", None))
        super().check_protocol(known)

    def summary_line(self, values: Mapping[str, float]) -> list[str]:
        """Return distance, interval, precision and recall; where no FID is measured, everything."""
        fid = self.evaluator.fid
        if fid is None or fid.tag not in values:
            return super().summary_line(values)
        parts, end = [f"FID ({fid.extractor.name}) {values[fid.tag]:.4g}"], ""
        if f"{fid.tag}{FINAL}" in values:
            end = FINAL
            parts.append(f"of {self.cfg.fid.final_samples:,} samples {values[f'{fid.tag}{end}']:.4g}")
        if f"{fid.tag}_low{end}" in values:
            low, high = values[f"{fid.tag}_low{end}"], values[f"{fid.tag}_high{end}"]
            parts.append(f"between the distributions {low:.4g} to {high:.4g}")
        quality = {name: values.get(fid.tag_of(name)) for name in ("precision", "recall")}
        return parts + [f"{name} {value:.3g}" for name, value in quality.items() if value is not None]

    def summary_rows(self, lines: list[dict[str, Any]], folder: Path) -> list[tuple[str, str]]:
        """Return FID, classes found, and what to do next."""
        fid, latest = self.evaluator.fid, self.evaluator.latest
        rows = [("FID", "not measured (evaluate_every is 0)")]
        if fid is not None:
            series = fid_series(lines, fid.tag)
            (first_epoch, first), (last_epoch, last) = series[0], series[-1]
            best_epoch, best = min(series, key=lambda pair: pair[1])
            text = f"first {first:.4g} (epoch {first_epoch}), best {best:.4g} ({best_epoch}), "
            text += f"last {last:.4g} ({last_epoch})"
            others = dict(fid_series(lines, fid.other_tag))
            if best_epoch in others:
                text += f"; the best against the {other_split(self.cfg.fid.reference)} images {others[best_epoch]:.4g}"
            if fid.floor is not None:
                text += f"; real test images {fid.floor:.4g}"
            rows = [(f"FID ({fid.extractor.name})", text)]
            for epoch, value in fid_series(lines, f"{fid.tag}{FINAL}")[-1:]:
                rows.append(("FID, final", f"{value:.4g} (epoch {epoch}) from {self.cfg.fid.final_samples:,} samples"))
        if latest is not None:
            rows += uncertainty_rows(latest)
            if latest.classes is not None:
                found, count = sum(n > 0 for n in latest.classes), sum(latest.classes)
                rows.append(("classes", f"{found} of {len(latest.classes)} found among {count:,} samples"))
        return [
            *rows,
            ("pictures", str(folder / "samples")),
            ("evaluate", f"python -m cbgan.evaluate --run {quote(str(folder))}"),
            ("paper's run", "python -m cbgan.train --config paper_ucb --device cuda"),
        ]


def gradient_variances(networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return mean and maximum over weight tensors of the variance within each one's last gradient, by tag.

    Of the generator also the mean over those outside the layers under test, which every kind has.
    """
    found: dict[str, Tensor] = {}
    for name, network in networks.items():
        gradients = {key: p.grad for key, p in network.named_parameters() if p.grad is not None}
        if each := variances(gradients.values()):
            stacked = torch.stack(each)
            found |= {f"gradient/{name}_variance": stacked.mean(), f"gradient/{name}_variance_max": stacked.max()}
        if each and name == "g":
            shared = variances(g for key, g in gradients.items() if not key.startswith(UNDER_TEST))
            found["gradient/g_variance_shared"] = torch.stack(shared).mean()
    return found
