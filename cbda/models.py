"""The networks that a configuration names."""

import re

from torch import nn

from cbda.adaptation.losses import Alignment
from cbda.config import AdaMatchConfig, ModelConfig
from cbda.networks.classifier import Classifier
from cbda.networks.wide_resnet import WideResNet
from common.networks.from_timm import blank_output, timm_network
from common.norms.config import settings_of
from common.runtime.errors import UsageError


def build_networks(cfg: AdaMatchConfig, num_classes: int) -> dict[str, nn.Module]:
    """Make the classifier, what alignment remembers and, if asked for, the classifier of the source alone.

    Raises:
        UsageError: as `build_classifier`.
    """
    networks: dict[str, nn.Module] = {
        "adamatch": build_classifier(cfg, num_classes),
        "alignment": Alignment(num_classes, cfg.method.decay, cfg.method.history),
    }
    if cfg.source_only:  # of one domain, BatchNorm by domain is BatchNorm: a first layer, or what the network has
        plain = "none" if cfg.model.convert else "bn"
        networks["source_only"] = build_classifier(cfg, num_classes, kind=plain if cfg.norm.kind == "dsbn" else None)
    return networks


def build_classifier(cfg: AdaMatchConfig, num_classes: int, *, kind: str | None = None) -> Classifier:
    """Make the network with the layer under test; what torch's generator gives is drawn from it.

    Args:
        cfg: the run's configuration.
        num_classes: length of the output.
        kind: another layer in place of the one under test, the first; the network's BatchNorms stay.

    Raises:
        UsageError: if timm has no such network, its weights cannot be had or do not fit, it has no such BatchNorm, or
            the network takes no images of the configuration's size.
    """
    norm = cfg.norm if kind is None else type(cfg.norm)(kind=kind)
    network = _network(cfg.model, num_classes)
    try:
        made = Classifier(network, norm, cfg.model.convert if kind is None else (), cfg.seed)
    except ValueError as error:
        field = str(error).split(":")[0]
        own = {"where": "model.convert"} | {name: f"norm.{name}" for name in settings_of(norm.kind)}
        raise UsageError(str(error).replace(field, own.get(field, field), 1)) from None
    size = cfg.data.size
    try:
        blank_output(made.network, size)
    except ValueError as error:
        raise UsageError(f"data.size: {cfg.model.name} cannot take images of {size} pixels ({error})") from None
    return made


def _network(model: ModelConfig, num_classes: int) -> nn.Module:
    if (wrn := re.fullmatch(r"wrn-(\d+)-(\d+)", model.name)) is not None:
        return WideResNet(int(wrn[1]), int(wrn[2]), num_classes, model.variant, model.momentum)
    return timm_network(model.name, num_classes, pretrained=model.pretrained, weights=model.weights)
