"""Tasks as training makes them, without an evaluation."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from common.data import ImageSet
from common.train.task import Task, TrainContext

T = TypeVar("T", bound=Task[Any])


def made(kind: type[T], cfg: Any, images: Mapping[str, ImageSet] | None = None) -> T:
    """Return a task on the CPU, by default on the images that its configuration names."""
    context = TrainContext(torch.device("cpu"), dry_run=True)
    return kind(cfg, kind.load_images(cfg) if images is None else images, context)  # pyright: ignore[reportCallIssue]
