"""A cluster for each image, which layers of known clusters normalise by: from what a data set says, or from a file."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from common.data.image_set import ImageSet, Splits
from common.runtime.atomic import write_text_atomic
from common.runtime.errors import UsageError
from common.runtime.fields import MAY_CHANGE
from common.runtime.paths import texts_to_paths


@dataclass(frozen=True, kw_only=True)
class ClustersConfig:
    """Which cluster each image belongs to; normalization layers that take clusters (scb, scb_base, dsbn) need one."""

    by: Literal["none", "superclasses", "classes", "file"] = "none"
    """superclasses: those the data set has (docs/data.md); classes: the very labels that are to be learnt; file: one
    that python -m cbcls.clusters wrote. The first two tell a network of test images, too, something of their labels."""
    file: Path | None = field(default=None, metadata=MAY_CHANGE)
    """The file of clusters.by file."""

    def __post_init__(self) -> None:
        texts_to_paths(self)
        if (self.file is not None) != (self.by == "file"):
            wanted = "a file for clusters.by file" if self.by == "file" else f"null for clusters.by {self.by}"
            raise ValueError(f"clusters.file: expected {wanted}, got {'null' if self.file is None else self.file}")

    @property
    def tells_labels(self) -> bool:
        """Whether clusters follow from labels, those of test images included."""
        return self.by in ("superclasses", "classes")


def with_clusters(splits: Splits, cfg: ClustersConfig) -> Splits:
    """Give the images of all splits the clusters that a configuration names.

    Raises:
        UsageError: if the images have no such labels, or the file is missing, damaged, or of other images.
    """
    if cfg.by == "none":
        return splits
    if cfg.file is not None:
        return _from_file(splits, cfg.file)
    return replace(splits, **{name: _from_labels(images, cfg.by) for name, images in splits.items()})


def clusters_origin(cfg: ClustersConfig) -> dict[str, Any]:
    """Return what clusters follow from, as plain values: of a file, the configuration that made it.

    Raises:
        UsageError: if the file cannot be read, or holds no clusters.
    """
    origin: dict[str, Any] = {"by": cfg.by}
    if cfg.file is None:
        return origin
    return origin | {"file": str(cfg.file), "configuration": _content(cfg.file).get("configuration")}


def write_clusters(path: Path, splits: Splits, configuration: dict[str, Any]) -> None:
    """Write the clusters of images as JSON: how they were made, a hash of each split's pixels, names and numbers."""
    given = [(name, images, images.clusters) for name, images in splits.items() if images.clusters is not None]
    content = {
        "configuration": configuration,
        "pixels": {name: images.pixel_hash for name, images, _ in given},
        "names": splits.train.cluster_names,
        "clusters": {name: clusters.tolist() for name, _, clusters in given},
    }
    write_text_atomic(path, json.dumps(content) + "\n")


def _from_labels(images: ImageSet, by: str) -> ImageSet:
    numbers, names = (
        (images.superclasses, images.superclass_names) if by == "superclasses" else (images.labels, images.classes)
    )
    if numbers is None:
        raise UsageError(
            f"clusters.by: the {images.split} images of {images.name} have no {by}; take clusters.by file, or a data "
            f"set that has them{' (data.superclasses for your own images)' if by == 'superclasses' else ''}"
        )
    return replace(images, clusters=numbers, cluster_names=names)


def _from_file(splits: Splits, path: Path) -> Splits:
    content = _content(path)
    try:
        names = tuple(str(name) for name in content["names"])
        pixels = {str(name): str(value) for name, value in content["pixels"].items()}
        numbers = {name: torch.tensor(content["clusters"][name], dtype=torch.int64) for name in pixels}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _no_clusters(path) from None
    found = {}
    for split, images in splits.items():
        if pixels.get(split) != images.pixel_hash:
            raise UsageError(
                f"clusters.file: {path} was made of other {split} images than {images.name} at data.size "
                f"{images.images.shape[-1]}; run python -m cbcls.clusters with the same data"
            )
        try:
            found[split] = replace(images, clusters=numbers[split], cluster_names=names)
        except ValueError as error:
            raise UsageError(f"clusters.file: {path} is damaged ({error})") from None
    return replace(splits, **found)


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"clusters.file: {path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise _no_clusters(path)
    return content


def _no_clusters(path: Path) -> UsageError:
    return UsageError(f"clusters.file: {path} holds no clusters; python -m cbcls.clusters writes one")
