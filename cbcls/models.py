"""The networks that a configuration names."""

from torch import nn

from cbcls.config import ClassifierConfig
from cbcls.networks.classifier import Classifier
from cbcls.networks.shallow_cnn import ShallowCNN
from common.data import ImageSet
from common.errors import UsageError
from common.networks.pixels import PixelScale, Standardised


def build_classifier(
    cfg: ClassifierConfig, num_classes: int, num_clusters: int = 0, images: ImageSet | None = None
) -> Classifier:
    """Make the network with the layer under test; what torch's generator gives is drawn from it.

    It maps images in [-1, 1] (see `common.data.to_input`) and the cluster of each to logits.

    Args:
        cfg: the run's configuration.
        num_classes: length of the output.
        num_clusters: how many clusters images have; 0 where they have none.
        images: those it is to train on, which ``data.normalise dataset`` takes its moments from; without, they
            come with the weights that are loaded.

    Raises:
        UsageError: if there are other clusters than the layer has components, or the network cannot be had.
    """
    if cfg.takes_clusters and num_clusters != cfg.norm.num_components:
        raise UsageError(
            f"norm.num_components: expected {num_clusters}, one for each cluster that images have by clusters.by "
            f"{cfg.clusters.by}, got {cfg.norm.num_components}"
        )
    network = _network(cfg, num_classes, num_clusters if cfg.model.cluster_input else 0)
    network.pixels = _pixels(cfg, images)
    return network


def _network(cfg: ClassifierConfig, num_classes: int, num_clusters: int) -> Classifier:
    return ShallowCNN(num_classes, cfg.norm, cfg.seed, num_clusters, cfg.model.position or 3)


def _pixels(cfg: ClassifierConfig, images: ImageSet | None) -> nn.Module:
    kind = cfg.data.normalise
    if kind == "dataset":
        return Standardised(None if images is None else images.images)
    return nn.Identity() if kind == "signed" else PixelScale(kind)
