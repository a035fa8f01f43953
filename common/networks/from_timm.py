"""Networks of timm by name, with weights from a file or timm's own."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.norms import clusters
from common.norms.base import NormLayer
from common.runtime.errors import UsageError


def timm_network(name: str, num_classes: int, *, pretrained: bool = False, weights: Path | None = None) -> nn.Module:
    """Make a network of timm.

    Args:
        name: timm's, with or without ``timm:`` before it.
        num_classes: length of its output; 0 for features.
        pretrained: take timm's weights, which may be downloaded.
        weights: a file to take weights from; a last layer of another size is left out.

    Raises:
        UsageError: if timm has no such network, or its weights cannot be had or do not fit.
    """
    import timm  # noqa: PLC0415 - takes seconds, which other networks need not

    name = name.removeprefix("timm:")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of networks by older names
            network = timm.create_model(name, pretrained=pretrained, num_classes=num_classes)
    except RuntimeError as error:
        raise UsageError(f"model.name: timm cannot make {name} ({' '.join(str(error).split())[:200]})") from None
    except OSError as error:
        raise UsageError(
            f"model.pretrained: the weights of {name} cannot be had ({' '.join(str(error).split())[:200]}); "
            "expected a connection, or a file by --model.weights; HF_HUB_OFFLINE=1 spares the retries"
        ) from None
    if weights is not None:
        _load(network, weights, f"timm:{name}")
    return network


@torch.no_grad()
def blank_output(network: nn.Module, size: int) -> Tensor:
    """Return a network's output in evaluation for one blank image (1, 3, size, size) of cluster 0.

    Raises:
        ValueError: if it takes no such images, with its reason in one line.
    """
    training, backends = network.training, {m: m.backend for m in network.modules() if isinstance(m, NormLayer)}
    try:
        for layer in backends:
            layer.backend = "reference"  # the layer's own may not run on a CPU
        with clusters(torch.zeros(1, dtype=torch.int64)):
            return network.eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from None
    finally:
        network.train(training)
        for layer, backend in backends.items():
            layer.backend = backend


def _load(network: nn.Module, path: Path, called: str) -> None:
    state: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # noqa: PLC0415

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise a dozen unrelated types
        # Torch's second sentence tells how to unpickle whatever the file holds.
        reason = " ".join(str(error).split()).split(". ")[0][:200] or type(error).__name__
        raise UsageError(f"model.weights: {path} cannot be read as weights ({reason})") from None
    if not isinstance(state, Mapping):
        raise UsageError(f"model.weights: {path} holds a {type(state).__name__}, expected tensors by name")
    state, own = state.get("state_dict", state.get("model", state)), network.state_dict()
    # Models that this project exported hold timm's network beside other layers.
    inner = {name.removeprefix("network."): value for name, value in state.items() if name.startswith("network.")}
    state = max(state, inner, key=lambda names: len(own.keys() & names.keys()))
    fitting = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    missing = [name for name in own if name not in fitting]
    parts = {name.split(".")[0] for name in fitting}
    more = [name for name in state if name not in own and name.split(".")[0] in parts]
    for names, what in ((missing, "missing or of another shape"), (more, f"{len(more)} that this network has not")):
        if len(names) > 2:  # the last layer's weight and bias
            raise UsageError(
                f"model.weights: {path} holds {len(fitting)} of the {len(own)} tensors of {called}; "
                f"{what}: {', '.join(names[:3])}, ..."
            )
    network.load_state_dict(fitting, strict=False)
