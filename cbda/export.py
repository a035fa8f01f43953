"""Adapted classifiers apart from their runs: read from a run or a folder of their own, and written to one."""

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cbda.config import AdaMatchConfig
from cbda.domains import load_domains
from cbda.evaluation import CLASSES, CLUSTERS, clusters_of
from cbda.models import build_classifier
from cbda.networks.classifier import Classifier
from common.classification.stored import check_images, export, read_stored
from common.data import to_float
from common.errors import UsageError
from common.metrics.logits import classify, evaluating
from common.networks.pixels import pixels_of


@dataclass(frozen=True, eq=False)
class AdaptedModel:
    """A classifier that was adapted, with what its use needs.

    Attributes:
        classifier: in evaluation mode.
        cfg: the configuration of its run.
        classes: names, in the order of the logits.
        threshold: of confidence, that pseudo-labels last had to reach.
    """

    classifier: Classifier
    cfg: AdaMatchConfig
    classes: tuple[str, ...]
    threshold: float

    def logits(self, images: Tensor, cluster: str = "target") -> Tensor:
        """Return logits (N, C), float64, of uint8 images (N, 3, S, S) as members of a cluster.

        Args:
            images: of the side S that the run had, ``cfg.data.size``.
            cluster: source, target or unknown; without meaning where the layer asks for none.

        Raises:
            UsageError: if the layer cannot be told this cluster.
            ValueError: if the images are not of this type and size.
        """
        check_images(images, self.cfg.data.size)
        known = clusters_of(self.cfg.norm.kind)
        if cluster not in CLUSTERS or (len(known) > 1 and cluster not in known):
            raise UsageError(f"cluster: expected {' or '.join(known)} of {self.cfg.norm.kind}, got {cluster}")
        device = next(self.classifier.parameters()).device

        def classifier(batch: Tensor) -> Tensor:
            x = pixels_of(to_float(batch.to(device)), self.cfg.model.pixels)
            return self.classifier(x, torch.full((len(batch),), CLUSTERS[cluster], device=device))

        with evaluating(self.classifier):
            return classify(classifier, images, len(self.classes), batch_size=256)

    def save(self, folder: Path) -> None:
        """Write weights, configuration and classes to a folder that `load_model` reads.

        Raises:
            UsageError: if the folder holds a model already.
        """
        export(folder, self.classifier, self.cfg, {"classes": self.classes, "threshold": self.threshold})


def load_model(path: Path | str, device: torch.device | str = "cpu") -> AdaptedModel:
    """Load an adapted classifier from a run's folder (its newest checkpoint) or from one that `save` wrote.

    Nothing but tensors is read from files of weights, and nothing is unpickled.

    Raises:
        UsageError: if the folder is neither, or its files do not belong together.
    """
    stored = read_stored(AdaMatchConfig, path, "adamatch")
    cfg = stored.cfg
    if stored.facts is not None:
        classes, threshold = stored.fact("classes", tuple), stored.fact("threshold", float)
    else:
        names = stored.folder / CLASSES
        known = json.loads(names.read_text(encoding="utf-8")) if names.is_file() else load_domains(cfg)["train"].classes
        classes, threshold = tuple(known), float(stored.state["networks"]["alignment"]["threshold"])
    # Weights come from the file, not from wherever training started.
    plain = replace(cfg, model=replace(cfg.model, weights=None, pretrained=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of how it trains, which its run has told
        network = build_classifier(plain, len(classes))
    stored.load_into(network)
    return AdaptedModel(network.eval().to(device), cfg, classes, threshold)
