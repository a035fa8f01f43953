"""A network's outputs for many images, batch by batch, on one process or shared by several."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from common.runtime.distributed import Env


def in_batches(
    rows: Callable[[int, int], Tensor],
    count: int,
    columns: int,
    *,
    batch_size: int,
    env: Env,
    go_on: Callable[[], None] = lambda: None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return (count, columns) on the CPU; each process makes every world-th batch, ``rows(start, n)``, and gets all.

    ``go_on`` is called before each batch, on all processes alike; what it raises ends the work.
    """
    found = torch.zeros(count, columns, dtype=dtype)
    for first in range(0, count, batch_size * env.world):
        go_on()
        mine = torch.zeros(batch_size, columns, dtype=dtype)
        start = first + batch_size * env.rank
        if (n := min(batch_size, count - start)) > 0:
            mine[:n] = rows(start, n).to(dtype).cpu()
        for rank, theirs in enumerate(env.stacked(mine)):
            start = first + batch_size * rank
            found[start : start + batch_size] = theirs[: max(0, count - start)]
    return found


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
        clusters: int64 (N,), of which the classifier takes those of the batch (B,) as a second argument; or None.
        batch_size: images B at once.
        env: this process among those that share the work, each with the same classifier.
        go_on: called before each batch, as in `in_batches`.
    """
    inputs = (images,) if clusters is None else (images, clusters)

    def rows(start: int, n: int) -> Tensor:
        return classifier(*(each[start : start + n] for each in inputs))

    return in_batches(
        rows, len(images), num_classes, batch_size=batch_size, env=env or Env(), go_on=go_on, dtype=torch.float64
    )


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
