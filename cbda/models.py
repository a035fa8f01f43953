"""The networks that a configuration names."""

import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from cbda.config import AdaMatchConfig, ModelConfig
from cbda.networks.classifier import Classifier
from cbda.networks.wide_resnet import WideResNet
from common.errors import UsageError

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def build_classifier(cfg: AdaMatchConfig, num_classes: int, *, kind: str | None = None) -> Classifier:
    """Make the network with the layer under test; what torch's generator gives is drawn from it.

    Args:
        cfg: the run's configuration.
        num_classes: length of the output.
        kind: another layer in place of the one under test.

    Raises:
        UsageError: if timm has no such network, its weights cannot be had or do not fit, or it has no such BatchNorm.
    """
    norm = cfg.norm if kind is None else type(cfg.norm)(kind=kind)
    network = _network(cfg.model, num_classes)
    try:
        return Classifier(network, norm, () if kind == "bn" else cfg.model.convert, cfg.seed)
    except ValueError as error:
        raise UsageError(str(error).replace("where:", "model.convert:")) from None


def _network(model: ModelConfig, num_classes: int) -> nn.Module:
    if (wrn := re.fullmatch(r"wrn-(\d+)-(\d+)", model.name)) is not None:
        return WideResNet(int(wrn[1]), int(wrn[2]), num_classes, model.form, model.momentum)
    import timm  # noqa: PLC0415 - takes seconds, which other networks need not

    name = model.name.removeprefix("timm:")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of networks by older names
            network = timm.create_model(name, pretrained=model.pretrained, num_classes=num_classes)
    except RuntimeError as error:
        raise UsageError(f"model.name: timm cannot make {name} ({' '.join(str(error).split())[:200]})") from None
    except OSError as error:
        raise UsageError(
            f"model.pretrained: the weights of {name} cannot be had ({' '.join(str(error).split())[:200]}); "
            "expected a connection, or a file by --model.weights"
        ) from None
    if model.weights is not None:
        _load(network, model)
    return network


def _load(network: nn.Module, model: ModelConfig) -> None:
    """Take over a file of weights, but for a last layer of another size."""
    assert model.weights is not None
    state: Any
    try:
        if model.weights.suffix == ".safetensors":
            from safetensors.torch import load_file  # noqa: PLC0415

            state = load_file(model.weights)
        else:
            state = torch.load(model.weights, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise a dozen unrelated types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"model.weights: {model.weights} cannot be read as weights ({reason})") from None
    state = state.get("state_dict", state.get("model", state))
    own = network.state_dict()
    fitting = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    missing = [name for name in own if name not in fitting]
    if len(missing) > 2:  # the last layer's weight and bias
        raise UsageError(
            f"model.weights: {model.weights} holds {len(fitting)} of the {len(own)} tensors of {model.name}; "
            f"missing or of another shape: {', '.join(missing[:3])}, ..."
        )
    network.load_state_dict(fitting, strict=False)


def pixels_of(signed: Tensor, kind: str) -> Tensor:
    """Map images in [-1, 1] to what `ModelConfig.pixels` says."""
    if kind == "signed":
        return signed
    unit = (signed + 1) / 2
    if kind == "unit":
        return unit
    if kind == "raw":
        return unit * 255
    mean, deviation = (torch.tensor(values, device=signed.device)[:, None, None] for values in _IMAGENET)
    return (unit - mean) / deviation
