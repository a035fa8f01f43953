"""What a classifier says of many images, batch by batch, on one process or shared by several."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from common.machine.dist import Env


@torch.no_grad()
def classify(
    classifier: Callable[..., Tensor],
    images: Tensor,
    num_classes: int,
    *,
    clusters: Tensor | None = None,
    batch_size: int,
    env: Env | None = None,
    go_on: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return logits (N, C), float64 on the CPU; each process takes every world-th batch, and gets all.

    Args:
        classifier: from images (B, 3, H, W), uint8 on the CPU, to logits (B, C).
        images: uint8 (N, 3, H, W).
        num_classes: classes C.
        clusters: int64 (N,), which the classifier is then given as a second argument, those of the batch (B,).
        batch_size: images B at once.
        env: this process among those that share the work, each with the same classifier.
        go_on: called before each batch, on all processes alike; what it raises ends the measurement.
    """
    env = env or Env()
    size, world = batch_size, env.world
    logits = torch.zeros(len(images), num_classes, dtype=torch.float64)
    for first in range(0, len(images), size * world):
        go_on()
        mine = torch.zeros(size, num_classes, dtype=torch.float64)
        share = slice(first + size * env.rank, first + size * (env.rank + 1))
        batch = images[share]
        if len(batch):
            told = () if clusters is None else (clusters[share],)
            mine[: len(batch)] = classifier(batch, *told).double().cpu()
        for rank, rows in enumerate(env.stacked(mine)):
            start = first + size * rank
            logits[start : start + size] = rows[: max(0, len(images) - start)]
    return logits


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network in evaluation mode, without gradients, inside the block."""
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(training)
