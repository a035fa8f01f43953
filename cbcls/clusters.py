"""Find a cluster for each image of a data set: ``python -m cbcls.clusters --data.name cifar10 --num_clusters 3``."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from common.data import DataConfig, ImageSet, Splits, load
from common.data.clusters import write_clusters
from common.data.image_set import resize
from common.runtime.cli import parse
from common.runtime.command import run_command
from common.runtime.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class FindClustersConfig:
    """Find clusters in the images of a data set by a Gaussian mixture, for scb and scb_base (clusters.by file).

    Pixels are standardised over the training images and brought to few dimensions by principal components; a mixture
    with diagonal covariances is fitted to the training images (k-means++, best of several starts), and tells the
    cluster of every image, those for testing included. Labels have no part in it.
    """

    num_clusters: int = 3
    """Clusters K, which norm.num_components then has to be; the paper takes 3, and 5 for DenseNets."""
    components: int = 64
    """Principal components that the mixture is fitted to."""
    restarts: int = 10
    """Starts of the mixture, of which the likeliest is kept."""
    side: int = 32
    """Larger images are brought to this side first, as far as the mixture is concerned."""
    seed: int = 0
    """Of principal components and starts."""
    out: Path | None = None
    """The file to write; null is clusters/DATA-SIZE-kK-seedS.json."""
    force: bool = False
    """Write over a file of other clusters."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import first, which add data sets of your own."""
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        least = {"num_clusters": 2, "components": 1, "restarts": 1, "side": 4, "seed": 0}
        for name, value in least.items():
            if (given := getattr(self, name)) < value:
                raise ValueError(f"{name}: expected at least {value}, got {given}")

    @property
    def path(self) -> Path:
        """The file to write."""
        name = f"{self.data.name}-{self.data.size}-k{self.num_clusters}-seed{self.seed}.json"
        return self.out or Path("clusters") / name

    def method(self) -> dict[str, Any]:
        """Return what the clusters follow from besides the images."""
        names = ("num_clusters", "components", "restarts", "side", "seed")
        return {"method": "gaussian mixture", **{name: getattr(self, name) for name in names}}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError: if images cannot be had, or there are too few, or a file of other clusters is in the way.
    """
    cfg = parse(FindClustersConfig, argv, prog="python -m cbcls.clusters")
    splits = load(cfg.data)
    if cfg.path.exists() and not cfg.force:
        if not _holds(cfg.path, splits, cfg.method()):
            raise UsageError(
                f"out: {cfg.path} holds other clusters; choose another file, or write over it with --force"
            )
        print(f"clusters   {cfg.path} (these very ones were there)")
    else:
        found = find_clusters(splits, cfg)
        write_clusters(cfg.path, found, cfg.method())
        for name, images in found.items():
            print(f"{name:10} {_described(images)}")
        print(f"clusters   {cfg.path}")
    print(
        f"use        python -m cbcls.train --norm.kind scb --norm.num_components {cfg.num_clusters} --clusters.by file "
        f"--clusters.file {quote(str(cfg.path))}"
    )


def find_clusters(splits: Splits, cfg: FindClustersConfig) -> Splits:
    """Return the images with the clusters found in those for training; cluster 0 is the largest there.

    Raises:
        UsageError: if there are too few images, or a cluster has none.
    """
    from sklearn.decomposition import PCA  # noqa: PLC0415 - scikit-learn takes a second, a mistyped flag none
    from sklearn.exceptions import ConvergenceWarning  # noqa: PLC0415
    from sklearn.mixture import GaussianMixture  # noqa: PLC0415
    from sklearn.pipeline import make_pipeline  # noqa: PLC0415
    from sklearn.preprocessing import StandardScaler  # noqa: PLC0415

    pixels, clusters = _pixels(splits.train, cfg.side), cfg.num_clusters
    if clusters > len(pixels):
        raise UsageError(f"num_clusters: expected at most {len(pixels)}, as many as training images, got {clusters}")
    if (pixels == pixels[0]).all():
        raise UsageError(
            f"data.name: the training images of {splits.train.name} are all the same, expected some that differ"
        )
    if (most := min(pixels.shape)) < cfg.components:
        raise UsageError(
            f"components: expected at most {most}, for {len(pixels)} images of {pixels.shape[1]} values, got "
            f"{cfg.components}"
        )
    mixture = GaussianMixture(
        clusters, covariance_type="diag", n_init=cfg.restarts, init_params="k-means++", max_iter=1000,
        random_state=cfg.seed,
    )  # fmt: skip
    reduce = make_pipeline(StandardScaler(copy=False), PCA(cfg.components, random_state=cfg.seed)).fit(pixels)
    points = {
        name: reduce.transform(_pixels(images, cfg.side)).astype("float64")  # in float32 EM stops at worse mixtures
        for name, images in splits.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of a start that is not the likeliest, perhaps
        mixture.fit(points["train"])
    found = {name: torch.from_numpy(mixture.predict(each)) for name, each in points.items()}
    counts = found["train"].bincount(minlength=clusters)
    if not counts.all():
        raise UsageError(
            f"num_clusters: expected at most {int((counts > 0).sum())}, since no training image falls into the others, "
            f"got {clusters}"
        )
    rank = counts.argsort(descending=True, stable=True).argsort()
    names = tuple(map(str, range(clusters)))
    given = {
        name: replace(images, clusters=rank[found[name]].to(torch.int64), cluster_names=names)
        for name, images in splits.items()
    }
    return replace(splits, **given)


def _pixels(images: ImageSet, side: int) -> Any:
    """Return the values of each image, float32 (N, 3 * side * side) for those that are not smaller."""
    small = [resize(part, min(side, part.shape[-1])).flatten(1).float() for part in images.chunks()]
    return torch.cat(small).numpy()


def _holds(path: Path, splits: Splits, method: dict[str, Any]) -> bool:
    """Say whether a file holds the clusters of these images by this method."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        pixels = {name: images.pixel_hash for name, images in splits.items()}
        return content["configuration"] == method and content["pixels"] == pixels
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _described(images: ImageSet) -> str:
    assert images.clusters is not None
    counts = images.clusters.bincount(minlength=len(images.cluster_names)).tolist()
    text = f"images by cluster {' '.join(map(str, counts))}"
    if images.labels is None:
        return text
    from sklearn.metrics import mutual_info_score  # noqa: PLC0415 - as above

    information = mutual_info_score(images.labels.numpy(), images.clusters.numpy())
    return f"{text}; {information:.3f} nats of mutual information with the class"


if __name__ == "__main__":
    run_command(main)
