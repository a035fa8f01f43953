"""Adapt a classifier from one domain to another by AdaMatch: ``python -m cbda.adamatch``."""

from common.cli.command import start

if __name__ == "__main__":
    start("cbda.adamatch")  # before torch is loaded, since it settles how threads wait; does not return

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from cbda.config import NOISE_PARTS, AdaMatchConfig
from cbda.domains import load_domains
from cbda.evaluation import Evaluation
from cbda.losses import (
    Alignment,
    aligned,
    batch_mean,
    interpolated,
    masked_cross_entropy,
    ramp,
    relative_threshold,
)
from cbda.models import build_classifier
from cbda.networks.classifier import SOURCE, TARGET
from common.data import ImageSet, Stream
from common.data.augmentation import strong, weak
from common.errors import UsageError
from common.machine.dist import Env, mean_over_ranks
from common.machine.seeding import permutation, uniform_per_sample
from common.metrics.gradient_variance import gradient_noise, gradient_variance
from common.networks.pixels import pixels_of
from common.training.loop import train
from common.training.method import Method, Moment, Tracked
from common.training.optimisation import make_optimizer
from common.training.update import Part, Update

_CLASSES_CHARTED = 20
_NEARLY_ALL = 0.95
"""Mask rate from which on every pseudo-label counts as passing."""
_THRESHOLD_FELL, _ACCURACY_FELL = 0.9, 0.8
"""Shares of its highest value below which threshold and source accuracy count as falling."""
_ONE_CLASS, _ONE_OF_TWO, _SOME = 0.9, 0.99, 0.1
"""Share of the pseudo-labels that counts as all, of two classes, and of the target that has to have any."""
Values = dict[str, Tensor]


class AdaMatch(Method[AdaMatchConfig]):
    """AdaMatch (Berthelot et al., ICLR 2022), and beside it a network that sees the source alone."""

    application = "cbda"
    command = "adamatch"
    config = AdaMatchConfig

    def __init__(
        self, cfg: AdaMatchConfig, images: Mapping[str, ImageSet], device: torch.device, env: Env | None = None
    ) -> None:
        super().__init__(cfg, images, device, env)
        self.averaged = ("adamatch", "source_only") if cfg.source_only else ("adamatch",)

    @classmethod
    def tracked(cls, cfg: AdaMatchConfig) -> dict[str, Tracked]:
        """Return the values that need no label of the target, and the target's accuracy, which an oracle may see."""
        return {
            "metric/validation_accuracy": Tracked("validation", "higher"),
            "loss/validation": Tracked("validation", "lower"),
            "metric/target_information": Tracked("target", "higher"),
            "metric/target_density": Tracked("target", "higher"),
            "metric/target_accuracy": Tracked("target_test", "higher", chosen_by_test=True),
        }

    @classmethod
    def load(cls, cfg: AdaMatchConfig) -> dict[str, ImageSet]:
        """Return both domains' images, see `load_domains`, and of the source those to validate on if any are."""
        images = cls.with_validation(cfg, load_domains(cfg))
        choice = cls.choice(cfg)
        if choice is not None and choice[1].split not in images:
            raise UsageError(f"best.by: {choice[0]} needs labels, and the target {images['target'].name} has none")
        return images

    def default_name(self) -> str:
        """Return what a run without a name is called."""
        cfg = self.cfg
        return f"{cfg.source.name}-{cfg.target.name}-{cfg.norm.kind}-seed{cfg.seed}"

    def streams(self) -> dict[str, Stream]:
        """Return source, target and, if there are any, labelled target images, each seen weakly and strongly."""
        cfg, world = self.cfg, self.env.world
        views = weak(cfg.data.size, cfg.data.flip), strong(cfg.data.size, cfg.data.flip)
        sizes = {"train": cfg.batch_size, "target": cfg.batch_size * cfg.target_ratio}
        for name, size in sizes.items():
            if size * world * cfg.accumulate > len(self.images[name]):
                domain = "source" if name == "train" else "target"
                raise UsageError(
                    f"batch_size: expected at most the {len(self.images[name])} images of the {domain}, got "
                    f"{size * world * cfg.accumulate} a step"
                )
        if "target_labelled" in self.images:
            share = len(self.images["target_labelled"]) // (world * cfg.accumulate)
            sizes["target_labelled"] = max(1, min(cfg.batch_size, share))
        return {name: Stream(self.images[name], size, views) for name, size in sizes.items()}

    def build(self) -> dict[str, nn.Module]:
        """Make the classifier, what alignment remembers, and the classifier of the source alone."""
        cfg, classes = self.cfg, self.images["train"].num_classes
        networks: dict[str, nn.Module] = {
            "adamatch": build_classifier(cfg, classes),
            "alignment": Alignment(classes, cfg.method.decay, cfg.method.history),
        }
        if cfg.source_only:  # of one domain, BatchNorm by domain is BatchNorm: a first layer, or what the network has
            plain = "none" if cfg.model.convert else "bn"
            networks["source_only"] = build_classifier(cfg, classes, kind=plain if cfg.norm.kind == "dsbn" else None)
        return networks

    def optimize(self, networks: Mapping[str, nn.Module]) -> dict[str, Optimizer]:
        """Make Adam or SGD for each classifier."""
        cfg = self.cfg

        def make(network: nn.Module) -> Optimizer:
            return make_optimizer(cfg.optimizer, network, lr=cfg.lr, weight_decay=cfg.weight_decay, eps=1e-7)

        return {name: make(networks[name]) for name in self.averaged}

    def step(self, update: Update) -> None:
        """Update the classifier by AdaMatch's loss, and the other one by the source's."""
        mu = ramp(update.progress, self.cfg.method.warmup)
        noted: list[Values] = []

        def adamatch(part: Part) -> Tensor:
            loss, values = self.loss(part, mu)
            noted.append(values)
            return loss

        def source_only(part: Part) -> Tensor:
            source = part["train"]
            x = self.to_input(torch.cat(source.views))
            logits = self.wrapped["source_only"](x, torch.full((len(x),), SOURCE, device=self.device))
            return self._supervised([logits], source.labels)

        update.descend("adamatch", adamatch)
        for name in dict.fromkeys(name for values in noted for name in values):
            kept = update.of_epoch if name.startswith("gradient/") else update.values
            kept[name] = torch.stack([values[name] for values in noted if name in values]).mean(0)
        update.values["schedule/mu"] = torch.tensor(mu)
        if self.cfg.source_only:
            update.descend("source_only", source_only)

    def loss(self, part: Part, mu: float) -> tuple[Tensor, Values]:
        """Return AdaMatch's loss on a part of the batch, and what is to be logged of it.

        The numbers are those of the paper's section 3: (1) to (3) random logit interpolation, (4) distribution
        alignment, (5) relative confidence threshold, (6) to (8) the loss.
        """
        method, source, target = self.cfg.method, part["train"], part["target"]
        labelled = part.batches.get("target_labelled")
        others = [*(labelled.views if labelled else ()), *target.views]
        x = self.to_input(torch.cat([*source.views, *others]))
        rows, others_rows = 2 * len(source.labels), len(x) - 2 * len(source.labels)
        cluster = torch.tensor([SOURCE] * rows + [TARGET] * others_rows, device=self.device)

        # One pass over both domains, one over the source alone that leaves no trace; a mixture of both for the source.
        together = alone = self.wrapped["adamatch"](
            x, cluster, rows if method.interpolation else 0, inference=method.source_pass == "inference"
        )
        if method.interpolation:
            together, alone = together
        together, from_source = together.float(), together[:rows].float()
        if method.interpolation:
            from_source = interpolated(from_source, alone.float(), self._shares(part, together.shape[1]))
        source_weak = from_source.chunk(2)[0]
        target_weak, target_strong = together[-2 * len(target.labels) :].chunk(2)
        labelled_logits = together[rows : len(x) - 2 * len(target.labels)]

        # Pseudo-labels: the target's predictions, aligned with the distribution of classes that is wanted.
        p_source, p_target = source_weak.softmax(1), target_weak.softmax(1)
        p_wanted = labelled_logits.chunk(2)[0].softmax(1) if method.align_by == "labelled" else p_source
        wanted, found = batch_mean(p_wanted), batch_mean(p_target)
        alignment = self.networks["alignment"]
        assert isinstance(alignment, Alignment)
        if method.alignment == "running":
            wanted, found = alignment(wanted, found)
        elif method.alignment == "none":
            wanted = found
        pseudo = aligned(p_target, wanted, found, method.scaling or "sum")

        # Only those count that are sure, measured by how sure the network is of the source.
        threshold = relative_threshold(p_source, method.tau)
        mask = pseudo.amax(1) >= threshold

        loss_source = self._supervised(
            [from_source, *([labelled_logits] if labelled else [])], source.labels, labelled and labelled.labels
        )
        loss_target = masked_cross_entropy(target_strong, pseudo, mask, method.labels or "hard")
        values = {"loss/source": loss_source, "loss/target": loss_target, "adapt/threshold": threshold}
        shares = batch_mean(F.one_hot(pseudo.argmax(1), pseudo.shape[1]) * mask[:, None].float())
        accuracy = mean_over_ranks((source_weak.argmax(1) == source.labels).float().mean())
        values |= {"adapt/source_accuracy": accuracy, "adapt/largest_class": shares.max()}
        values |= self._noted(pseudo, mask, target.labels, wanted / found)
        alignment.threshold.copy_(threshold)
        alignment.watch(threshold, accuracy, shares)

        if self._due(part, self.cfg.variance_every):
            values |= self._varying("variance", mask, gradient_variance, loss_source, loss_target)
        if self._due(part, self.cfg.noise_every):
            on_source = self._source_parts(from_source, source.labels)
            on_target = self._target_parts(target_strong, pseudo, mask)
            values |= self._varying("noise", mask, gradient_noise, on_source, on_target)
        return loss_source + mu * loss_target, {name: value.detach() for name, value in values.items()}

    def _supervised(self, logits: list[Tensor], *labels: Tensor | None) -> Tensor:
        """Return the cross-entropy of weak and strong images (each logits' halves), as ``source_loss`` adds them."""
        halves = [torch.cat(half) for half in zip(*(each.float().chunk(2) for each in logits), strict=True)]
        truth = torch.cat([each for each in labels if each is not None])
        total = F.cross_entropy(halves[0], truth) + F.cross_entropy(halves[1], truth)
        return total / 2 if self.cfg.method.source_loss == "mean" else total

    def _shares(self, part: Part, classes: int) -> Tensor:
        """Draw a number in [0, 1) for each logit of weak and strong source images (2 B, C), whoever shares the step."""
        index = part["train"].index
        entries = (index[:, None] * classes + torch.arange(classes)).flatten()
        draws = [uniform_per_sample(entries, part.seed, "interpolation", view, part.number) for view in (0, 1)]
        return torch.cat(draws).view(2 * len(index), classes).to(self.device)

    def _noted(self, pseudo: Tensor, mask: Tensor, labels: Tensor, ratio: Tensor) -> Values:
        """Return what tells whether adaptation works: see docs/adaptation.md."""
        values = {"adapt/mask_rate": mask.float().mean()}
        if self.images["target"].labels is not None:
            values["adapt/passing_right"] = (mask & (pseudo.argmax(1) == labels)).float().mean()
        if pseudo.shape[1] <= _CLASSES_CHARTED and self.cfg.method.alignment != "none":
            names = self.images["train"].classes
            values |= {f"adapt/ratio/{name}": value for name, value in zip(names, ratio, strict=True)}
        return values

    def _due(self, part: Part, every: int) -> bool:
        """Say whether something is measured on a part, the last one of every so manieth step."""
        return every > 0 and (part.number + 1) % (every * self.cfg.accumulate) == 0

    def _source_parts(self, logits: Tensor, labels: Tensor) -> list[Tensor]:
        """Return the source's loss on parts of a batch, from logits (2 B, C) of its weak and strong images."""
        weak_logits, strong_logits, truth = (whole.tensor_split(NOISE_PARTS) for whole in (*logits.chunk(2), labels))
        return [
            self._supervised([torch.cat(both)], true)
            for *both, true in zip(weak_logits, strong_logits, truth, strict=True)
        ]

    def _target_parts(self, logits: Tensor, pseudo: Tensor, mask: Tensor) -> list[Tensor]:
        """Return the target's loss on parts of a batch."""
        parts = zip(*(whole.tensor_split(NOISE_PARTS) for whole in (logits, pseudo, mask)), strict=True)
        kind = self.cfg.method.labels or "hard"
        return [masked_cross_entropy(part, labels, passing, kind) for part, labels, passing in parts]

    def _varying(self, what: str, mask: Tensor, measure: Callable[[Any, Any], Any], source: Any, target: Any) -> Values:
        """Return how the gradients of each domain's loss vary, without mu; nothing where no pseudo-label passes."""
        passing = bool(mean_over_ranks(mask.float().mean()) > 0)  # on any rank: all measure the same
        values: Values = {}
        for domain, loss in (("source", source), ("target", target)):
            if domain == "source" or passing:
                found = measure(loss, self.networks["adamatch"].parameters())
                values |= {f"gradient/{domain}_{what}_{how}": v for how, v in zip(("mean", "max"), found, strict=True)}
        return values

    def health(self, step: int) -> tuple[dict[str, float], list[str]]:
        """Return the layers' health and, if asked for, the variance of the gradients of all logits by domain."""
        values, warnings = super().health(step)
        network = self.networks["adamatch"]
        for domain, images, cluster in self._same_images() if self.cfg.logits_variance else ():
            training = network.training
            network.eval()
            with self.autocast():
                logits = network(self.to_input(images), torch.full((len(images),), cluster, device=self.device))
            network.train(training)
            found = gradient_variance(logits.float().sum(), network.parameters())
            names = (f"gradient/{domain}_logits_variance_{how}" for how in ("mean", "max"))
            values |= {name: float(value) for name, value in zip(names, found, strict=True)}
        return values, warnings

    def _same_images(self) -> Iterable[tuple[str, Tensor, int]]:
        """Yield domain, training images and cluster of a batch of each domain, the same all through a run."""
        for domain, name, cluster in (("source", "train", SOURCE), ("target", "target", TARGET)):
            order = permutation(len(self.images[name]), self.cfg.seed, "health")[: self.cfg.batch_size]
            yield domain, self.images[name].images[order], cluster

    def shown(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """Return shares of the pseudo-labels that passed; where none did, none."""
        values = dict(means)
        right, largest, passed = (
            values.pop("adapt/passing_right", None), values.pop("adapt/largest_class", 0.0), values["adapt/mask_rate"],
        )  # fmt: skip
        if passed:
            values["adapt/largest_class"] = largest / passed
            if right is not None:
                values["adapt/pseudo_label_accuracy_oracle"] = right / passed
        return values

    def to_input(self, images: Tensor) -> Tensor:
        """Bring uint8 images (N, 3, S, S) to the device, in the range of ``model.pixels``."""
        return pixels_of(super().to_input(images), self.cfg.model.pixels)

    def prepare(self, should_stop: Callable[[], bool]) -> None:
        """Choose what is measured."""
        self.evaluation = Evaluation(self.cfg, self.images, self.device, self.to_input, self.env)

    def evaluate(self, networks: Mapping[str, nn.Module], moment: Moment) -> dict[str, float]:
        """Measure both classifiers in both domains."""
        return self.evaluation.values(networks, moment)

    def probe(self, networks: Mapping[str, nn.Module], step: int) -> None:
        """Classify a batch of each domain's training images, the same all through a run, in training mode."""
        _, parts, clusters = zip(*self._same_images(), strict=True)
        ids = [cluster for cluster, images in zip(clusters, parts, strict=True) for _ in images]
        networks["adamatch"](self.to_input(torch.cat(parts)), torch.tensor(ids, device=self.device))

    def collapse(self, means: Mapping[str, float]) -> str | None:
        """Say so when the source is lost, all pseudo-labels pass a falling threshold, or they are of one class."""
        alignment, classes = self.networks["alignment"], self.images["train"].num_classes
        assert isinstance(alignment, Alignment)
        (threshold, accuracy, *shares), best = alignment.watch.recent.tolist(), alignment.watch.highest.tolist()
        method, limit = self.cfg.method, 2 * math.log(classes)
        # In inference mode BatchNorm's averages are far off in a run's first steps, and losses are whatever they are.
        if method.source_pass != "inference" and means["loss/source"] > limit * (1 + (method.source_loss == "sum")):
            return f"the source's loss {means['loss/source']:.3g} is more than twice that of equal guesses"
        if accuracy < _ACCURACY_FELL * best[1]:
            return f"accuracy on the source has fallen from {100 * best[1]:.0f} % to {100 * accuracy:.0f} %"
        if means["schedule/mu"] < 0.5:  # nothing much is learnt from the target yet
            return None
        if means["adapt/mask_rate"] > _NEARLY_ALL and threshold < _THRESHOLD_FELL * best[0]:
            return f"every pseudo-label passes a threshold that has fallen from {best[0]:.2g} to {threshold:.2g}"
        limit = _ONE_CLASS if classes > 2 else _ONE_OF_TWO
        if sum(shares) > _SOME and max(shares) > limit * sum(shares):
            return f"{100 * max(shares) / sum(shares):.0f} % of the pseudo-labels are of one class"
        return None

    def closing(self, lines: list[dict[str, Any]], folder: Path) -> list[tuple[str, str]]:
        """Return the last accuracies of both networks, by the cluster that was named."""
        last = {name: value for line in lines for name, value in line.items() if name.startswith("metric/")}

        def both(prefix: str) -> str:
            found = {domain: last.get(f"metric/{prefix}{domain}_accuracy") for domain in ("source", "target")}
            shown = [f"{domain} {100 * value:.1f} %" for domain, value in found.items() if value is not None]
            return ", ".join(shown) or "no labels to measure by"

        rows = [("source only", both("source_only_"))] if self.cfg.source_only else []
        rows.append(("AdaMatch", both("")))
        by = {name: last.get(f"metric/target_accuracy_as_{name}") for name in ("source", "target", "unknown")}
        told = [f"{100 * value:.1f} % as {name}" for name, value in by.items() if value is not None]
        if told:
            rows.append(("by cluster", f"target {', '.join(told)}; the paper names the source's for both"))
        rows.append(("picture", str(folder / "samples" / "predictions.png")))
        rows.append(("paper's run", "python -m cbda.adamatch --config configs/cbda/paper_scb.yaml --device cuda"))
        return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    train(AdaMatch, argv)
