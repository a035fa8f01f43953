"""Classifiers apart from their runs: read from a run's folder or an exported one, and exported to one."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cbcls.config import ClassifierConfig
from cbcls.evaluation import logits_of, recalibrate
from cbcls.models import build_classifier
from cbcls.networks.classifier import Classifier
from cbcls.task import CATEGORIES, ClassifierTask
from common.classification.leak_audit import UNKNOWN
from common.classification.stored import StoredModel, check_images, read_stored
from common.metrics.logits import evaluating
from common.runtime.errors import UsageError
from common.train.recalibration import recalibrates


@dataclass(frozen=True, eq=False)
class TrainedClassifier(StoredModel[ClassifierConfig]):
    """A classifier that was trained, with what its use needs.

    Attributes:
        network: in evaluation mode, with the statistics by which it is measured.
        cfg: the configuration of its run.
        classes: names, in the order of the logits.
        clusters: names of the clusters that it takes, in the order of their numbers; empty where it takes none.
        epoch: after how many it was taken.
        protocol: what the images and clusters of its run were (see `Task.eval_protocol`).
    """

    network: Classifier
    classes: tuple[str, ...]
    clusters: tuple[str, ...]
    epoch: int
    protocol: dict[str, Any]

    def logits(self, images: Tensor, cluster: str | Tensor = "unknown") -> Tensor:
        """Return logits (N, C), float64, of uint8 images (N, 3, S, S).

        Args:
            images: of the side S that the run had, ``cfg.data.size``.
            cluster: the name of the one that all images belong to, or the number of each, int64 (N,); unknown where
                nobody can say.

        Raises:
            UsageError: if there is no such cluster, or the layer has to be given one.
            ValueError: if the images are not of this type and size.
        """
        check_images(images, self.cfg.data.size)
        ids = cluster if isinstance(cluster, Tensor) else self._ids(cluster, len(images))
        with evaluating(self.network):
            return logits_of(self.cfg, self.network, images, len(self.classes), ids, self.device)

    def check_cluster(self, cluster: str) -> None:
        """Raise UsageError if the classifier cannot be given this cluster."""
        if not self.clusters:
            if cluster != "unknown":
                raise UsageError(f"cluster: this classifier is given none ({self.cfg.norm.kind}); leave {cluster} out")
            return
        known = [*(["unknown"] if self.cfg.knows_unknown else []), *self.clusters]
        if cluster not in known:
            has_to = "" if self.cfg.knows_unknown else f", since {self.cfg.norm.kind} has to be given one"
            shown = ", ".join(known[:20]) + (f" and {len(known) - 20} others" if len(known) > 20 else "")
            raise UsageError(f"cluster: expected one of {shown}{has_to}, got {cluster}")

    def _ids(self, cluster: str, count: int) -> Tensor | None:
        self.check_cluster(cluster)
        if not self.clusters:
            return None
        # A cluster that is itself called unknown goes first: it is what the name says.
        number = self.clusters.index(cluster) if cluster in self.clusters else UNKNOWN
        return torch.full((count,), number)


def load_model(path: Path | str, device: torch.device | str = "cpu", *, checkpoint: str = "last") -> TrainedClassifier:
    """Load a classifier from a run's folder or from one that `save` wrote.

    Nothing but tensors is read from files of weights, and nothing is unpickled. A checkpoint that its run did not
    measure needs the training images, from which statistics are estimated as they are before a measurement.

    Args:
        path: the folder.
        device: where the classifier is to be.
        checkpoint: of a run: last, best, or the number of an epoch that was kept.

    Raises:
        UsageError: if the folder is neither, there is no such checkpoint, files do not belong together, or the layers'
            backend cannot run there.
    """
    stored = read_stored(ClassifierConfig, path, "network", checkpoint)
    cfg = stored.cfg
    cfg.check_backend(torch.device(device))
    # Weights come from the file, not from wherever training started.
    plain = replace(cfg, model=replace(cfg.model, weights=None, pretrained=False))

    def names_of_images() -> dict[str, Any]:
        train = ClassifierTask.load_images(cfg)["train"]
        return {"classes": train.classes, "clusters": train.cluster_names}

    def of_run() -> dict[str, Any]:
        names = stored.noted(
            CATEGORIES, lambda known: {key: tuple(known[key]) for key in ("classes", "clusters")}, names_of_images
        )
        given = {} if cfg.uses_clusters else {"clusters": ()}
        return names | given | {"epoch": stored.state["run"]["epoch"], "protocol": stored.state["protocol"]}

    model = stored.model(
        TrainedClassifier,
        of_run,
        lambda facts: build_classifier(plain, len(facts["classes"]), len(facts["clusters"])),
    )
    network = model.network.to(device)
    if not stored.recalibrated and recalibrates(cfg, network):
        recalibrate(cfg, network, ClassifierTask.load_images(cfg)["train"], torch.device(device))
    return model
