"""Classifiers apart from their runs: read from a run's folder or an exported one, and exported to one."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cbcls.config import ClassifierConfig
from cbcls.evaluation import CATEGORIES, Evaluation, logits_of
from cbcls.models import build_classifier
from cbcls.networks.classifier import Classifier
from cbcls.train import Classification
from common.classification.leak_audit import UNKNOWN
from common.classification.stored import Stored, check_images, export, read_stored
from common.data import ImageSet
from common.errors import UsageError
from common.metrics.logits import evaluating
from common.norms import MixtureNorm


@dataclass(frozen=True, eq=False)
class TrainedClassifier:
    """A classifier that was trained, with what its use needs.

    Attributes:
        network: in evaluation mode, its mixtures calibrated.
        cfg: the configuration of its run.
        classes: names, in the order of the logits.
        clusters: names of the clusters that it can be told, in the order of their numbers; empty where it is told none.
        epoch: after how many it was taken.
        passport: what the images and clusters of its run were (see `Method.passport`).
    """

    network: Classifier
    cfg: ClassifierConfig
    classes: tuple[str, ...]
    clusters: tuple[str, ...]
    epoch: int
    passport: Mapping[str, Any]

    def logits(self, images: Tensor, cluster: str | Tensor = "unknown") -> Tensor:
        """Return logits (N, C), float64, of uint8 images (N, 3, S, S).

        Args:
            images: of the side S that the run had, ``cfg.data.size``.
            cluster: the name of the one that all images belong to, or the number of each, int64 (N,); unknown where
                nobody can say.

        Raises:
            UsageError: if there is no such cluster, or the layer has to be told one.
            ValueError: if the images are not of this type and size.
        """
        check_images(images, self.cfg.data.size)
        ids = cluster if isinstance(cluster, Tensor) else self._ids(cluster, len(images))
        device = next(self.network.parameters()).device
        with evaluating(self.network):
            return logits_of(self.cfg, self.network, images, len(self.classes), ids, device)

    def check_cluster(self, cluster: str) -> None:
        """Raise UsageError if the classifier cannot be told this cluster."""
        if not self.clusters:
            if cluster != "unknown":
                raise UsageError(f"cluster: this classifier is told none ({self.cfg.norm.kind}); leave {cluster} out")
            return
        known = [*(["unknown"] if self.cfg.knows_unknown else []), *self.clusters]
        if cluster not in known:
            has_to = "" if self.cfg.knows_unknown else f", since {self.cfg.norm.kind} has to be told one"
            shown = ", ".join(known[:20]) + (f" and {len(known) - 20} others" if len(known) > 20 else "")
            raise UsageError(f"cluster: expected one of {shown}{has_to}, got {cluster}")

    def _ids(self, cluster: str, count: int) -> Tensor | None:
        self.check_cluster(cluster)
        if not self.clusters:
            return None
        # A cluster that is itself called unknown goes first: it is what the name says.
        number = self.clusters.index(cluster) if cluster in self.clusters else UNKNOWN
        return torch.full((count,), number)

    def save(self, folder: Path) -> None:
        """Write weights, configuration and names to a folder that `load_model` reads.

        Raises:
            UsageError: if the folder holds a model already.
        """
        facts = {name: getattr(self, name) for name in ("classes", "clusters", "epoch")}
        export(folder, self.network, self.cfg, facts | {"passport": dict(self.passport)})


def load_model(
    path: Path | str,
    device: torch.device | str = "cpu",
    *,
    checkpoint: str = "last",
    images: Mapping[str, ImageSet] | None = None,
) -> TrainedClassifier:
    """Load a classifier from a run's folder or from one that `save` wrote.

    Nothing but tensors is read from files of weights, and nothing is unpickled. A run with Mixture Normalization needs
    its training images, which mixtures are calibrated to; an exported one has that done.

    Args:
        path: the folder.
        device: where the classifier is to be.
        checkpoint: of a run: last, best, or the number of an epoch that was kept.
        images: the run's, if they are loaded already.

    Raises:
        UsageError: if the folder is neither, there is no such checkpoint, or files do not belong together.
    """
    stored = read_stored(ClassifierConfig, path, "network", checkpoint)
    cfg = stored.cfg
    if stored.facts is not None:
        classes, clusters = stored.fact("classes", tuple), stored.fact("clusters", tuple)
        epoch, passport = stored.fact("epoch", int), stored.fact("passport", dict)
    else:
        classes, clusters = _categories(stored, images)
        epoch, passport = stored.state["at"]["epoch"], stored.state["passport"]
    # Weights come from the file, not from wherever training started.
    plain = replace(cfg, model=replace(cfg.model, weights=None, pretrained=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of how it trains, which its run has told
        network = build_classifier(plain, len(classes), len(clusters))
    stored.load_into(network)
    network.eval().to(device)
    if stored.facts is None and any(isinstance(layer, MixtureNorm) for layer in network.modules()):
        found = Evaluation(cfg, images or Classification.load(cfg), torch.device(device))
        with found.measuring(network):
            state = {name: value.clone() for name, value in network.state_dict().items()}
        network.load_state_dict(state)
    return TrainedClassifier(network, cfg, classes, clusters if cfg.told_clusters else (), epoch, passport)


def _categories(
    stored: Stored[ClassifierConfig], images: Mapping[str, ImageSet] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of a run's classes and clusters: as it noted them, or from its images."""
    file = stored.folder / CATEGORIES
    if images is None and file.is_file():
        try:
            names = json.loads(file.read_text(encoding="utf-8"))
            return tuple(names["classes"]), tuple(names["clusters"])
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"run: {file} is damaged; remove it, and names are taken from the images") from None
    train = (images or Classification.load(stored.cfg))["train"]
    return train.classes, train.cluster_names
