"""Draw what trained classifiers make of images: ``python -m cbcls.figures --kind embedding --runs runs/cbcls/NAME``."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from cbcls.export import TrainedClassifier, load_model
from cbcls.networks.shallow_cnn import ShallowCNN
from cbcls.task import ClassifierTask
from common.data import ImageSet
from common.reports.densities import Sample, channel_moments, densities, moments_of
from common.reports.embedding import Panel, collect_features, draw_panels, pairs, project
from common.reports.figures import labelled, stems
from common.reports.records import group_by_seed, read_run
from common.runtime.cli import parse
from common.runtime.command import run_command
from common.runtime.device import resolve_device
from common.runtime.errors import UsageError
from common.runtime.paths import refuse_overwriting
from common.runtime.seeding import permutation
from common.tables import markdown_row

FEATURES = "features"
"""Instead of a layer's name: what the last linear map is given."""
_COMPONENTS = 5


@dataclass(frozen=True, kw_only=True)
class FiguresConfig:
    """Draw what trained classifiers make of a batch of test images, from the folders of their runs.

    densities: how activations are distributed, with the components of a mixture fitted to them (the paper's Figure 2),
    and a table of skewness, excess kurtosis and distance from a normal distribution, over seeds. embedding: features
    by t-SNE at kept epochs (Figures 1 and 9). components: a layer's outputs by principal components, five against each
    other (Figure 14).
    """

    kind: Literal["densities", "embedding", "components"] = "densities"
    """What to draw."""
    runs: list[Path] = field(default_factory=list)
    """Folders of runs, for instance runs/cbcls/digits-ucb-seed0; components takes one."""
    label: list[str] = field(default_factory=list)
    """The models' names in the order of the runs; without any, the settings in which they differ."""
    out: Path | None = None
    """The figure: OUT.png and OUT.svg."""
    images: int = 256
    """How many test images, drawn by the seed."""
    seed: int = 0
    """Of the draw, and of t-SNE and the mixture."""
    checkpoints: list[str] = field(default_factory=lambda: ["last"])
    """last, best, or epochs that were kept (checkpoint_keep); embedding draws a column for each."""
    layers: list[str] = field(default_factory=list)
    """Whose outputs, by name in the network, or features, what the last linear map is given. Without any, densities
    takes the layer under test and the shallow CNN's conv2, embedding the features, components the layer under test."""
    colour: Literal["predicted", "class", "superclass", "cluster"] | None = None
    """What embedding and components colour by; null is predicted and superclass."""
    cluster: Literal["own", "unknown"] = "own"
    """What layers of known clusters are given of an image."""
    perplexity: float = 30.0
    """Of t-SNE: about how many neighbours a point has."""
    title: str = ""
    """A line above embedding and components."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:n."""
    force: bool = False
    """Replace figures that exist."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs: name at least one run's folder, --runs runs/cbcls/NAME")
        if self.out is None or not self.out.name.removesuffix(".png").removesuffix(".svg"):
            given = "none" if self.out is None else repr(str(self.out))
            raise ValueError(f"out: expected the figure's path without ending, such as --out tsne, got {given}")
        if self.images < 1:
            raise ValueError(f"images: expected at least 1, got {self.images}")
        if self.kind == "components" and len(self.runs) != 1:
            raise ValueError(f"runs: components takes one run, got {len(self.runs)}")
        if not self.checkpoints or (self.kind != "embedding" and len(self.checkpoints) > 1):
            raise ValueError(f"checkpoints: {self.kind} takes one, got {' '.join(self.checkpoints) or 'none'}")
        if self.kind != "densities" and len(self.layers) > 1:
            raise ValueError(f"layers: {self.kind} takes one, got {' '.join(self.layers)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError: if a folder is no run, has no such checkpoint or layer, or there are too few images.
    """
    cfg = parse(FiguresConfig, argv, prog="python -m cbcls.figures")
    assert cfg.out is not None  # FiguresConfig refuses otherwise
    refuse_overwriting(*stems(cfg.out), force=cfg.force)
    draw = {"densities": _densities, "embedding": _embedding, "components": _components}[cfg.kind]
    try:
        written = draw(cfg, cfg.out)
    except ValueError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"out: cannot write {cfg.out} ({error.strerror})") from None
    print(f"written: {', '.join(map(str, written))}")


class _Batch(NamedTuple):
    """What a classifier made of a batch of test images."""

    model: TrainedClassifier
    images: ImageSet
    outputs: Mapping[str, Tensor]
    """By layer, (B, ...)."""
    logits: Tensor


def _densities(cfg: FiguresConfig, out: Path) -> tuple[Path, Path]:
    groups = labelled(group_by_seed([read_run(path) for path in cfg.runs]), cfg.label)
    found = {
        label: [_by_location(_run(cfg, run.path, cfg.checkpoints[0]).outputs) for run in group]
        for label, group in groups.items()
    }
    places = list(dict.fromkeys(place for batches in found.values() for each in batches for place in each))
    samples = []
    for place in places:
        for label, batches in found.items():
            if place not in batches[0]:
                raise UsageError(f"layers: {groups[label][0].path} has no {place}; name layers that all models have")
            samples.append(Sample(batches[0][place], label, place))
    counts = [run.settings.get("norm.num_components") for group in groups.values() for run in group]
    components = max((count for count in counts if isinstance(count, int)), default=3)
    written = densities(out, samples, columns=len(found), components=components, seed=cfg.seed)
    names = ("skewness", "kurtosis", "distance")
    print(markdown_row(["model", "seeds", "layer", *names, *(f"{name} by channel" for name in names)]))
    print("|" + "---|" * 9)
    for label, batches in found.items():
        seeds = " ".join(str(run.seed) for run in groups[label])
        for place in batches[0]:
            cells = [_over_seeds([getattr(moments(batch[place]), name) for batch in batches])
                     for moments in (moments_of, channel_moments) for name in names]  # fmt: skip
            print(markdown_row([label, seeds, place, *cells]))
    print(
        "\nAll channels together; by channel: means over channels of |skewness|, kurtosis and distance. Kurtosis is "
        "excess; distance is Kolmogorov's and Smirnov's to the normal distribution of the same mean and deviation."
    )
    return written


def _by_location(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return each layer's output as (locations, channels); tokens (B, T, C) have their channels last already."""
    return {place: (x.movedim(1, -1) if x.ndim > 3 else x).flatten(0, -2) for place, x in outputs.items()}


def _over_seeds(values: Sequence[float]) -> str:
    return f"{fmean(values):.3g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


def _embedding(cfg: FiguresConfig, out: Path) -> tuple[Path, Path]:
    groups = labelled([[read_run(path)] for path in cfg.runs], cfg.label)
    panels = []
    for label, (run,) in groups.items():
        for checkpoint in cfg.checkpoints:
            batch = _run(cfg, run.path, checkpoint)
            (features,) = batch.outputs.values()
            points = project(features.flatten(1), seed=cfg.seed, perplexity=cfg.perplexity)
            labels = _labels(batch, cfg.colour or "predicted")
            panels.append(Panel(points, *labels, f"{label}, epoch {batch.model.epoch}"))
    return draw_panels(out, panels, columns=len(cfg.checkpoints), title=cfg.title)


def _components(cfg: FiguresConfig, out: Path) -> tuple[Path, Path]:
    batch = _run(cfg, cfg.runs[0], cfg.checkpoints[0])
    (outputs,) = batch.outputs.values()
    points = project(outputs.flatten(1), method="pca", components=_COMPONENTS)
    return pairs(out, points, *_labels(batch, cfg.colour or "superclass"), title=cfg.title)


def _run(cfg: FiguresConfig, path: Path, checkpoint: str) -> _Batch:
    """Run a classifier on the batch, and keep what its layers give, in float32 on the CPU."""
    model = load_model(path, resolve_device(cfg.device), checkpoint=checkpoint)
    test = ClassifierTask.load_images(model.cfg)["test"]
    images = test.select(permutation(len(test), cfg.seed, "figure")[: cfg.images])
    own = images.clusters if model.clusters and cfg.cluster == "own" else None
    modules: dict[str, nn.Module] = dict(model.network.named_modules())
    found: dict[str, list[Tensor]] = {}
    with ExitStack() as stack:
        for place in cfg.layers or _places(model, cfg.kind, path):
            if place == FEATURES:
                found[place] = stack.enter_context(collect_features(model.network))
                continue
            if place not in modules:
                raise UsageError(
                    f"layers: {path} has no {place}; it has {', '.join([FEATURES, *filter(None, modules)])}"
                )
            found[place] = []
            stack.enter_context(modules[place].register_forward_hook(_keep(found[place])))
        logits = model.logits(images.images, "unknown" if own is None else own)
    return _Batch(model, images, {place: torch.cat(each) for place, each in found.items()}, logits)


def _keep(outputs: list[Tensor]) -> Callable[..., None]:
    return lambda _layer, _args, output: outputs.append(output.detach().float().cpu())


def _places(model: TrainedClassifier, kind: str, path: Path) -> list[str]:
    """Return the layers that a figure shows where none is named."""
    if kind == "embedding":
        return [FEATURES]
    if isinstance(model.network, ShallowCNN):
        under_test = f"norm{model.network.position}"
        return [under_test] if kind == "components" else ["conv2", under_test]
    if model.cfg.model.convert:
        raise UsageError(f"layers: {path} has more than one layer under test; name those to show")
    return ["norm"]


def _labels(batch: _Batch, colour: str) -> tuple[Tensor, Sequence[str]]:
    """Return what points are coloured by: numbers (B,), and their names.

    Raises:
        UsageError: if the images have none of it.
    """
    images = batch.images
    known: dict[str, tuple[Tensor | None, Sequence[str]]] = {
        "predicted": (batch.logits.argmax(1), batch.model.classes),
        "class": (images.labels, images.classes),
        "superclass": (images.superclasses, images.superclass_names),
        "cluster": (images.clusters, images.cluster_names),
    }
    numbers, names = known[colour]
    if numbers is None:
        there = ", ".join(name for name, (found, _) in known.items() if found is not None)
        raise UsageError(f"colour: the images of {batch.model.cfg.data.name} have no {colour}; expected {there}")
    return numbers, names


if __name__ == "__main__":
    run_command(main)
