"""The networks that a configuration names."""

import re

from cbcls.config import ClassifierConfig
from cbcls.networks.classifier import Classifier
from cbcls.networks.densenet import DenseNet
from cbcls.networks.oxford_cnn import OxfordCNN
from cbcls.networks.shallow_cnn import ShallowCNN
from cbcls.networks.timm_classifier import TimmClassifier
from common.data import ImageSet
from common.networks.from_timm import timm_network
from common.networks.pixels import PixelScale, Standardised
from common.runtime.errors import UsageError


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
    network = _network(cfg, num_classes, num_clusters if cfg.model.onehot_cluster else 0)
    pixels = cfg.data.normalise
    if pixels == "dataset":
        network.pixels = Standardised(None if images is None else images.channel_moments())
    elif pixels != "signed":
        network.pixels = PixelScale(pixels)
    return network


def _network(cfg: ClassifierConfig, num_classes: int, num_clusters: int) -> Classifier:
    model, options = cfg.model, {"seed": cfg.seed, "num_clusters": num_clusters}
    if (dense := model.dense) is not None:
        return DenseNet(dense.depth, dense.growth, num_classes, cfg.norm, bottleneck=dense.bottleneck,
                        dropout=model.dropout, **options)  # fmt: skip
    if model.name == "shallow_cnn":
        return ShallowCNN(num_classes, cfg.norm, position=model.position or 3, **options)
    if model.name == "oxford_cnn":
        return OxfordCNN(num_classes, cfg.norm, size=cfg.data.size, **options)
    if model.name == "vit":
        from cbcls.networks.vit import ViT  # noqa: PLC0415 - timm takes seconds, which other networks need not

        return ViT(num_classes, cfg.norm, **options)
    return _of_timm(cfg, num_classes, num_clusters)


def _of_timm(cfg: ClassifierConfig, num_classes: int, num_clusters: int) -> TimmClassifier:
    model = cfg.model
    network = timm_network(model.name, num_classes, pretrained=model.pretrained, weights=model.weights)
    try:
        made = TimmClassifier(network, cfg.norm, model.convert, seed=cfg.seed, num_clusters=num_clusters)
    except ValueError as error:
        reason = re.sub(r"^(where|model): ", f"model.convert: {model.name}: ", str(error))
        place = "" if reason.startswith("model.") else "model." if reason.startswith("name: ") else "norm."
        raise UsageError(f"{place}{reason}") from None
    try:
        made.check_size(cfg.data.size)
    except ValueError as error:
        raise UsageError(f"data.size: {model.name} cannot take images of {cfg.data.size} pixels ({error})") from None
    return made
