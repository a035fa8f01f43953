"""What is measured of a classifier of two domains, and a picture of its predictions."""

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from cbda.config import AdaMatchConfig
from cbda.networks.classifier import SOURCE, TARGET, UNKNOWN
from common.data import ImageSet, to_input
from common.metrics.logits import classify, evaluating
from common.metrics.scores import Scores, classification_scores, information, neighbourhood_density
from common.networks.pixels import pixels_of
from common.norms.registry import kinds
from common.reports.sheet import Verdict, captioned_sheet, save_png
from common.runtime.device import autocast
from common.runtime.distributed import Env
from common.runtime.errors import NonFiniteError
from common.runtime.seeding import drawing, permutation
from common.train.recalibration import drawn, recalibrate_network
from common.train.task import EvalContext

CLUSTERS = {"source": SOURCE, "target": TARGET, "unknown": UNKNOWN}
TESTED = {"source": "test", "target": "target_test"}
"""Test images by domain."""
_DRAWN = 24
"""Images of each domain in the picture."""
_KNOW_UNKNOWN = ("scb", "scb_base")
_TRAINING = (("source", "train", SOURCE), ("target", "target", TARGET))
"""Domain, training images and cluster."""


def clusters_of(kind: str) -> dict[str, int]:
    """Return the cluster ids that a kind of layer can be given in evaluation; one where it asks for none."""
    if kind not in kinds(takes_clusters=True):
        return {"source": SOURCE}
    return CLUSTERS if kind in _KNOW_UNKNOWN else {"source": SOURCE, "target": TARGET}


def evaluation_batch_size(size: int) -> int:
    """Return 256 for images of up to 32 pixels a side; for larger ones as many as have as many pixels, at least 16."""
    return max(16, min(256, 256 * 32**2 // size**2))


class Evaluator:
    """Measures classifiers.

    Args:
        cfg: the run's configuration.
        images: the run's images, as `load_domains` returns them.
        device: where the classifiers are.
        to_input: from uint8 images to what they see.
        env: this process among those of the run; they share each measurement.
    """

    def __init__(
        self,
        cfg: AdaMatchConfig,
        images: Mapping[str, ImageSet],
        device: torch.device,
        to_input: Callable[[Tensor], Tensor],
        env: Env | None = None,
    ) -> None:
        self.cfg, self.images, self.device, self.to_input, self.env = cfg, images, device, to_input, env or Env()

    def values(self, networks: Mapping[str, nn.Module], context: EvalContext) -> dict[str, float]:
        """Measure both networks, log a picture, and return values by tag.

        Accuracy, precision, recall and F1 of the adapted network are by each cluster that its layer can be given, of
        the domain's own without a suffix; the last three are averaged over classes by their images, and the paper's
        Table VI has them by the source's cluster in both domains. Accuracies of the network that saw the source alone
        are by the source's, and the gain is what the other one has more of in the target.

        Raises:
            Interrupted: if ``context`` says so between two batches.
            NonFiniteError: if a logit is not finite.
        """
        adapted, values = networks["adamatch"], {}
        own: dict[str, Tensor] = {}
        clusters = clusters_of(self.cfg.norm.kind)
        tested = {domain: split for domain, split in TESTED.items() if split in self.images}
        for name, cluster in clusters.items():
            for domain, split in tested.items():
                logits = self.logits(adapted, split, cluster, context.go_on)
                found = self._scores(split, logits)
                weighted = found.weighted._asdict().items()
                scores = {f"metric/{domain}_accuracy": found.accuracy}
                scores |= {f"metric/{domain}_weighted_{score}": value for score, value in weighted}
                if len(clusters) > 1:
                    values |= {f"{tag}_as_{name}": value for tag, value in scores.items()}
                if name == domain or domain not in own:
                    own[domain] = logits
                    values |= scores
        if "validation" in self.images:
            logits, labels = self.logits(adapted, "validation", SOURCE, context.go_on), self.images["validation"].labels
            assert labels is not None
            values["metric/validation_accuracy"] = self._scores("validation", logits).accuracy
            values["loss/validation"] = float(F.cross_entropy(logits, labels))
        blind = self.logits(adapted, "target", TARGET, context.go_on)
        values["metric/target_information"] = information(blind)
        values["metric/target_density"] = neighbourhood_density(blind)
        if "source_only" in networks:
            for domain, split in tested.items():
                logits = self.logits(networks["source_only"], split, SOURCE, context.go_on)
                values[f"metric/source_only_{domain}_accuracy"] = self._scores(split, logits).accuracy
            if "target_test" in self.images:
                values["metric/gain"] = values["metric/target_accuracy"] - values["metric/source_only_target_accuracy"]
        if self.env.first:
            self._draw(own, blind, context)
        return values

    def logits(self, network: nn.Module, split: str, cluster: int, go_on: Callable[[], None] = lambda: None) -> Tensor:
        """Return logits (N, classes) of a split's images, all taken for members of one cluster."""

        def classifier(batch: Tensor) -> Tensor:
            ids = torch.full((len(batch),), cluster, device=self.device)
            with autocast(self.device, self.cfg.precision):
                return network(self.to_input(batch), ids)

        images, classes = self.images[split].images, self.images["train"].num_classes
        with evaluating(network), self.env.buffers_of_first(network):
            size = evaluation_batch_size(self.cfg.data.size)
            logits = classify(classifier, images, classes, batch_size=size, env=self.env, go_on=go_on)
        if not logits.isfinite().all():
            raise NonFiniteError(f"logits of the {split} images are not finite; the checkpoint before them stands")
        return logits

    def same_images(self) -> Iterator[tuple[str, Tensor, int]]:
        """Yield domain, training images (B, 3, S, S) and cluster of a batch of each, the same all through a run."""
        for domain, split, cluster in _TRAINING:
            order = permutation(len(self.images[split]), self.cfg.seed, "health")[: self.cfg.batch_size]
            yield domain, self.images[split].images[order], cluster

    def training_logits(self, network: nn.Module, step: int) -> Iterator[tuple[str, Tensor]]:
        """Yield domain and logits (B, classes) of fresh training images of each, weakly augmented.

        The network is in training mode, and its running statistics stay as they are.
        """
        view, seed = self.cfg.data.view("weak", self.cfg.data.size), self.cfg.seed
        for domain, split, cluster in _TRAINING:
            place = ("logits", split, step)
            index = permutation(len(self.images[split]), seed, *place)[: self.cfg.batch_size]
            x = self.to_input(view(self.images[split].images[index], index, seed, *place))
            buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
            with autocast(self.device, self.cfg.precision), drawing(seed, *place):  # dropout
                ids = torch.full((len(x),), cluster, device=self.device)
                logits = functional_call(network, buffers, (x, ids))
            yield domain, logits

    def _scores(self, split: str, logits: Tensor) -> Scores:
        labels = self.images[split].labels
        assert labels is not None
        return classification_scores(labels, logits, logits.shape[1])

    def _draw(self, own: Mapping[str, Tensor], blind: Tensor, context: EvalContext) -> None:
        """Draw some images of each domain with the classes that the adapted network predicts."""
        tiles: list[Tensor] = []
        captions: list[str] = []
        verdicts: list[Verdict] = []
        predictions = {TESTED[domain]: logits for domain, logits in own.items()}
        if "target_test" not in self.images:
            predictions["target"] = blind
        for split, logits in predictions.items():
            images, names = self.images[split], self.images["train"].classes
            index = permutation(len(images), self.cfg.seed, "shown")[:_DRAWN]
            predicted = logits[index].argmax(1)
            tiles.append(images.images[index])
            captions += [names[label] for label in predicted.tolist()]
            hits = [None] * len(index) if images.labels is None else (predicted == images.labels[index]).tolist()
            verdicts.extend("open" if hit is None else "right" if hit else "wrong" for hit in hits)
        sheet = captioned_sheet(torch.cat(tiles), captions, verdicts)
        context.log.image(context.step, "samples/predictions", sheet)
        save_png(sheet, context.folder / "samples" / "predictions.png")


def recalibrate(
    cfg: AdaMatchConfig,
    network: nn.Module,
    images: Mapping[str, ImageSet],
    device: torch.device,
    *,
    source_only: bool = False,
    go_on: Callable[[], None] = lambda: None,
) -> None:
    """Estimate anew what a classifier stores, from training images as evaluation sees them, the same each time.

    A batch has images of both domains in the shares of a training step, each as its domain's cluster. The target's need
    no labels.

    Args:
        cfg: the run's configuration, which says whether and how.
        network: on the device.
        images: the run's, "train" and "target".
        device: where the network is.
        source_only: the network saw the source alone, and so it does here.
        go_on: called between batches.

    Raises:
        NonFiniteError: if a layer is fed what is not finite.
    """
    how = cfg.recalibrate
    shares = {"train": 1} if source_only else {"train": 1, "target": cfg.target_ratio}

    def share(number: int, domain: str) -> int:
        return max(1, number * shares[domain] // sum(shares.values()))

    batches = [
        drawn(len(images[name]), share(how.images, name), share(how.batch_size, name), cfg.seed, name)
        for name in shares
    ]

    def forward(parts: tuple[Tensor, ...]) -> None:
        go_on()
        x = torch.cat([images[name].images[index] for name, index in zip(shares, parts, strict=True)])
        ids = torch.tensor([SOURCE] * len(parts[0]) + [TARGET] * (len(x) - len(parts[0])), device=device)
        with autocast(device, cfg.precision):
            x = to_input(x, device, channels_last=cfg.channels_last)
            network(pixels_of(x, cfg.model.pixels), ids)

    recalibrate_network(cfg, network, list(zip(*batches, strict=False)), forward)
