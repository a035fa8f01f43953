"""Adapted classifiers apart from their runs: read from a run or a folder of their own, and written to one."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cbda.config import AdaMatchConfig
from cbda.domains import load_domains
from cbda.evaluation import CLUSTERS, clusters_of, evaluation_batch_size, recalibrate
from cbda.models import build_classifier
from cbda.networks.classifier import Classifier
from cbda.task import CLASSES, AdaMatchTask
from common.classification.stored import StoredModel, check_images, read_stored
from common.data import to_input
from common.metrics.logits import classify, evaluating
from common.networks.pixels import pixels_of
from common.runtime.device import autocast
from common.runtime.errors import UsageError
from common.train.recalibration import recalibrates


@dataclass(frozen=True, eq=False)
class AdaptedModel(StoredModel[AdaMatchConfig]):
    """A classifier that was adapted, with what its use needs.

    Attributes:
        network: in evaluation mode, with the statistics by which it is measured.
        cfg: the configuration of its run.
        classes: names, in the order of the logits.
        threshold: of confidence, that pseudo-labels last had to reach.
        epoch: after how many it was taken.
    """

    network: Classifier
    classes: tuple[str, ...]
    threshold: float
    epoch: int

    def logits(self, images: Tensor, cluster: str = "target") -> Tensor:
        """Return logits (N, C), float64, of uint8 images (N, 3, S, S) as members of a cluster.

        Args:
            images: of the side S that the run had, ``cfg.data.size``.
            cluster: source, target or unknown; without meaning where the layer asks for none.

        Raises:
            UsageError: if the layer cannot be given this cluster.
            ValueError: if the images are not of this type and size.
        """
        check_images(images, self.cfg.data.size)
        known = clusters_of(self.cfg.norm.kind)
        if cluster not in CLUSTERS or (len(known) > 1 and cluster not in known):
            raise UsageError(f"cluster: expected {' or '.join(known)} of {self.cfg.norm.kind}, got {cluster}")

        def classifier(batch: Tensor) -> Tensor:
            x = to_input(batch, self.device, channels_last=self.cfg.channels_last)
            x = pixels_of(x, self.cfg.model.pixels)
            with autocast(self.device, self.cfg.precision):  # as the run measures it
                return self.network(x, torch.full((len(batch),), CLUSTERS[cluster], device=self.device))

        with evaluating(self.network):
            size = evaluation_batch_size(self.cfg.data.size)
            return classify(classifier, images, len(self.classes), batch_size=size)


def load_model(path: Path | str, device: torch.device | str = "cpu", *, checkpoint: str = "last") -> AdaptedModel:
    """Load an adapted classifier from a run's folder or from one that `save` wrote.

    Nothing but tensors is read from files of weights, and nothing is unpickled. A checkpoint that its run did not
    measure needs the training images, from which statistics are estimated as they are before a measurement.

    Args:
        path: the folder.
        device: where the classifier is to be.
        checkpoint: of a run: last, best, or the number of an epoch that was kept.

    Raises:
        UsageError: if the folder is neither, there is no such checkpoint, its files do not belong together, or the
            layers' backend cannot run there.
    """
    stored = read_stored(AdaMatchConfig, path, "adamatch", checkpoint)
    cfg = stored.cfg
    cfg.check_backend(torch.device(device))
    # Weights come from the file, not from wherever training started.
    plain = replace(cfg, model=replace(cfg.model, weights=None, pretrained=False))

    def of_run() -> dict[str, Any]:
        threshold = float(stored.state["networks"]["alignment"]["threshold"])
        classes = stored.noted(CLASSES, tuple, lambda: load_domains(cfg)["train"].classes)
        return {"classes": classes, "threshold": threshold, "epoch": stored.state["run"]["epoch"]}

    model = stored.model(AdaptedModel, of_run, lambda facts: build_classifier(plain, len(facts["classes"])))
    network = model.network.to(device)
    if not stored.recalibrated and recalibrates(cfg, network):
        recalibrate(cfg, network, AdaMatchTask.load_images(cfg), torch.device(device))
    return model
