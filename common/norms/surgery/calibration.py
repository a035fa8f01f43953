"""Fitting the mixtures that a model's layers evaluate with."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from ..em_norm import MixtureNorm
from ..health import mixture_layers
from ..unsupervised import MixtureLayer


def recalibrate(model: nn.Module, loader: Iterable[Any], batches: int = 100) -> list[str]:
    """Estimate anew the stored mixtures of every UCBNorm and MixtureNorm in a model, from what they are fed.

    What ``torch.optim.swa_utils.update_bn`` is for BatchNorm, which it leaves as it is: after weights were averaged
    (EMA, SWA), changed or converted, the mixtures describe activations that are no more. Everything that
    ``calibrate`` says holds here: one layer after the other in evaluation mode, one pass over the batches each.
    In a model that has BatchNorm too, call ``update_bn`` first.

    Args:
        model: holds the layers, or is one; called as ``model(input)``. A layer that does not run stays as it is, and
            so does one whose mixture is learned by gradients (``update="weight"``).
        loader: as for ``calibrate``.
        batches: the most that are taken each time.

    Returns:
        The qualified names of the layers, in the order of fitting.

    Raises:
        ValueError: as ``calibrate``, and where the model has neither UCBNorm with moving averages nor MixtureNorm.
    """
    layers = {layer: name for name, layer in mixture_layers(model).items() if layer.averages_mixture()}
    if not layers:
        raise ValueError("model: expected at least one UCBNorm with moving averages or MixtureNorm, found none")
    return _fit(model, layers, loader, batches)


def calibrate(model: nn.Module, loader: Iterable[Any], batches: int = 100) -> list[str]:
    """Fit the stored mixture of each MixtureNorm in a model once, by EM, to what it is fed in evaluation.

    One layer after the other, in the order in which the model runs them, so that each is fitted to inputs that
    the layers before it, fitted already, give in evaluation mode. So nothing else in the model moves: no running
    statistics, no dropout. The price is one pass over the batches for each layer, and one layer's sampled inputs
    in memory, up to 4,096 locations a batch in float32: 420 MB for 256 channels and 100 batches.

    Training afterwards moves the mixtures again, and goes on from these: to measure in the middle of a training
    run, calibrate a copy of the model.

    Args:
        model: holds the layers, or is one; called as ``model(input)``. A layer that does not run stays as it is.
        loader: batches, each a tensor or a tuple or list whose first item is the input; gone through several times.
        batches: the most that are taken each time.

    Returns:
        The qualified names of the fitted layers, in the order of fitting.

    Raises:
        ValueError: the model has no MixtureNorm; the loader has no batch, can be gone through only once, or gives
            no tensors; batches is less than 1; a layer is fed a value that is not finite. After any error the
            model is as it was.

    Source: arXiv:2403.16798, section III-B: process T mini-batches, run EM, store for inference.
    """
    found = mixture_layers(model).items()
    layers: dict[MixtureLayer, str] = {layer: name for name, layer in found if isinstance(layer, MixtureNorm)}
    if not layers:
        raise ValueError("model: expected at least one MixtureNorm layer, found none")
    return _fit(model, layers, loader, batches)


@contextmanager
def calibrated(model: nn.Module, loader: Iterable[Any], batches: int = 100) -> Iterator[list[str]]:
    """Calibrate a model inside the block, and give its layers back the mixtures that they had after it.

    For measuring in the middle of a training run, which then goes on as if nothing had been measured. A model
    without MixtureNorm stays as it is.

    Args:
        model: as for ``calibrate``.
        loader: as for ``calibrate``.
        batches: as for ``calibrate``.

    Yields:
        The qualified names of the fitted layers.

    Raises:
        ValueError: as ``calibrate``.
    """
    layers = [layer for layer in mixture_layers(model).values() if isinstance(layer, MixtureNorm)]
    before = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers()]
    try:
        yield calibrate(model, loader, batches) if layers else []
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
        for layer in layers:
            layer.forget_initialized()


@torch.no_grad()
def _fit(model: nn.Module, layers: Mapping[MixtureLayer, str], loader: Iterable[Any], batches: int) -> list[str]:
    if not isinstance(batches, int) or batches < 1:
        raise ValueError(f"batches: expected a whole number of at least 1, got {batches}")
    if not isinstance(loader, Iterable) or isinstance(loader, Iterator | Tensor):
        given = type(loader).__name__
        raise ValueError(f"loader: expected a DataLoader or a list, to go through several times, got {given}")
    training = {module: module.training for module in model.modules()}
    saved = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers()]
    model.eval()
    fitted: list[str] = []
    try:
        for layer in _in_order(model, list(layers), loader):
            layer.calibrate(_inputs(model, layer, layers[layer], islice(loader, batches)))
            fitted.append(layers[layer])
    except BaseException:
        for buffer, before in saved:
            buffer.copy_(before)
        for layer in layers:
            layer.forget_initialized()
        raise
    finally:
        for module, mode in training.items():
            module.training = mode
    return fitted


def _in_order(model: nn.Module, layers: list[MixtureLayer], loader: Iterable[Any]) -> list[MixtureLayer]:
    """Return the layers in the order in which the first batch reaches them."""
    reached: dict[Any, None] = {}
    handles = [layer.register_forward_pre_hook(lambda layer, _: reached.setdefault(layer)) for layer in layers]
    try:
        for batch in islice(loader, 1):
            _run(model, batch)
            return list(reached)
    finally:
        for handle in handles:
            handle.remove()
    raise ValueError("loader: expected at least one batch, got none")


def _inputs(model: nn.Module, layer: MixtureLayer, name: str, batches: Iterable[Any]) -> Iterator[Tensor]:
    """Run the model on each batch and yield what it fed the layer: several times if it runs several times."""
    caught: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught.append(args[0])

    for i, batch in enumerate(batches):
        caught.clear()
        handle = layer.register_forward_pre_hook(catch)
        try:
            _run(model, batch)
        finally:
            handle.remove()
        if not all(x.isfinite().all() for x in caught):
            raise ValueError(f"loader: expected finite activations, but batch {i} feeds {name} others")
        yield from caught


def _run(model: nn.Module, batch: Any) -> None:
    x = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(x, Tensor):
        given = type(batch).__name__
        raise ValueError(f"loader: expected tensors, or tuples or lists that begin with one, got {given}")
    model(x.to(next(chain(model.parameters(), model.buffers())).device))
