"""Features of a network in the plane: t-SNE or principal components, coloured by classes, domains or clusters."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.neighbors import KernelDensity
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from common.reports.figures import COLOURS, drawable, drawing_style, write_figure
from common.runtime.seeding import derive

_SIDE, _PAIR = 3.3, 1.7  # inches of one panel, and of one of many pairs
_DIMENSIONS = 50  # of what t-SNE is given, as its authors advise
_NAMED = 24
"""Most classes that have a name in the legend."""
_MARKERS = ("o", "^", "s", "D", "v", "P", "X")
_UNKNOWN = "0.75"
_LEGEND_POINTS = 8


@contextmanager
def collect_features(network: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a classifier's last linear layer is given, in each of its runs inside the block.

    The last linear layer is the one that a run reaches last, whatever its name. Each entry of the list is float32
    (B, D) on the CPU, detached.

    Raises:
        ValueError: if the network has no linear layer.

    Example:
        >>> with collect_features(network) as found, torch.no_grad():
        ...     logits = network(images)
        >>> features = torch.cat(found)
    """
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"network: {type(network).__name__} has no linear layer whose input could be shown")
    found: list[Tensor] = []
    latest: list[Tensor] = []

    def note(_layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        latest[:] = args[:1]

    def keep(*_: Any) -> None:
        found.extend(x.detach().float().flatten(1).cpu() for x in latest)
        latest.clear()

    handles = [layer.register_forward_pre_hook(note) for layer in linear]
    handles.append(network.register_forward_hook(keep))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def project(
    features: Tensor,
    *,
    method: Literal["tsne", "pca"] = "tsne",
    components: int = 2,
    seed: int = 0,
    perplexity: float = 30.0,
) -> Tensor:
    """Bring features (N, D) to few dimensions, float32 (N, components); the same features give the same points.

    t-SNE starts from the principal components, and is given the first 50 of them where there are more.

    Args:
        features: one row a point.
        method: tsne, whose distances mean neighbourhood and nothing else, or pca, which is linear.
        components: dimensions of the result.
        seed: of t-SNE's draws.
        perplexity: of t-SNE, about how many neighbours a point has.

    Raises:
        ValueError: naming features or perplexity, if there are too few points or dimensions, all points are the same,
            or one is not finite.
    """
    if features.ndim != 2 or features.shape[1] < components:
        raise ValueError(f"features: expected (N, D) with D of at least {components}, got {tuple(features.shape)}")
    if not features.isfinite().all():
        raise ValueError("features: expected finite values")
    needed = components + 1
    if method == "tsne":
        if not perplexity >= 1:
            raise ValueError(f"perplexity: expected at least 1, got {perplexity:g}")
        needed = int(3 * perplexity) + 2  # a point is compared with three times as many neighbours
    if len(features) < needed:
        way = f"t-SNE of perplexity {perplexity:g}" if method == "tsne" else f"{components} principal components"
        remedy = " or a smaller perplexity" if method == "tsne" else ""
        raise ValueError(f"features: {way} needs at least {needed} points, got {len(features)}; take more{remedy}")
    values = features.detach().double().cpu().numpy()
    if not np.ptp(values, axis=0).any():
        raise ValueError("features: all points are the same, there is nothing to show")
    first = min(components if method == "pca" else max(components, _DIMENSIONS), *values.shape)
    with threadpool_limits(1):  # the same sums on any number of cores, and no waiting for a busy one
        values = PCA(first, svd_solver="full").fit_transform(values)
        if method == "tsne":
            start = derive(seed, "tsne") % 2**32
            tsne = TSNE(components, perplexity=perplexity, init="pca", random_state=start)
            values = tsne.fit_transform(values.astype(np.float32))
    return Tensor(values.astype(np.float32))


@dataclass(frozen=True)
class Panel:
    """A cloud of points.

    Attributes:
        points: (N, 2).
        labels: the number of each point's class (N,), -1 where it is not known.
        classes: their names.
        title: above the panel.
    """

    points: Tensor
    labels: Tensor
    classes: Sequence[str]
    title: str = ""


def draw_panels(
    path: Path, panels: Sequence[Panel], *, columns: int | None = None, title: str = ""
) -> tuple[Path, Path]:
    """Draw clouds of points side by side, each class in a colour and, up to 24 of them, with its name.

    Args:
        path: PATH.png and PATH.svg are written, each whole or not at all; either ending may be given.
        panels: the clouds, row by row.
        columns: panels a row; all in one without it.
        title: above the figure.

    Returns:
        The two files.
    """
    columns = min(columns or len(panels), len(panels))
    rows = -(-len(panels) // columns)
    shared = all(list(panel.classes) == list(panels[0].classes) for panel in panels)
    with drawing_style():
        figure = Figure(figsize=(_SIDE * columns, _SIDE * rows + 0.9), layout="constrained")
        for number, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, number + 1)
            _scatter(axes, panel)
            if not shared:
                axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.01), **_legend(panel, _SIDE))
        if shared:
            figure.legend(loc="outside lower center", **_legend(panels[0], _SIDE * columns))
        if title:
            figure.suptitle(title)
        return write_figure(figure, path)


def pairs(path: Path, points: Tensor, labels: Tensor, classes: Sequence[str], *, title: str = "") -> tuple[Path, Path]:
    """Draw each two of some components over each other below the diagonal, and each one's histogram on it.

    The green line over a histogram is a kernel estimate of the density, of Scott's bandwidth.

    Args:
        path: PATH.png and PATH.svg are written.
        points: (N, M), M at least 2.
        labels: the number of each point's class (N,), -1 where it is not known.
        classes: their names.
        title: above the figure.

    Returns:
        The two files.
    """
    count = points.shape[1]
    with drawing_style():
        figure = Figure(figsize=(_PAIR * count, _PAIR * count), layout="constrained")
        for row in range(count):
            for column in range(row + 1):
                axes = figure.add_subplot(count, count, row * count + column + 1)
                if row == column:
                    _histogram(axes, points[:, row])
                else:
                    _scatter(axes, Panel(points[:, [column, row]], labels, classes), size=5)
                axes.set_xlabel(f"component {column + 1}" if row == count - 1 else "", fontsize=9)
                axes.set_ylabel(f"component {row + 1}" if column == 0 else "", fontsize=9)
        figure.legend(loc="upper right", bbox_to_anchor=(0.99, 0.94),
                      **_legend(Panel(points, labels, classes), _PAIR * count / 2))  # fmt: skip
        if title:
            figure.suptitle(title)
        return write_figure(figure, path)


def _histogram(axes: Axes, values: Tensor) -> None:
    x = values.double().numpy()
    axes.hist(x, bins=30, density=True, color="0.82")
    axes.set(xticks=[], yticks=[])
    deviation = x.std()
    if deviation > 0:
        at = np.linspace(x.min(), x.max(), 200)
        estimate = KernelDensity(bandwidth=len(x) ** -0.2).fit(x[:, None] / deviation)
        axes.plot(at, np.exp(estimate.score_samples(at[:, None] / deviation)) / deviation, color=COLOURS[2])


def class_colours(count: int) -> list[str]:
    """Return a colour for each of some classes; neighbours in number differ as far as they can."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    if count <= 20:
        return [to_hex(colormaps["tab10" if count <= 10 else "tab20"](i)) for i in range(count)]
    return [to_hex(colormaps["turbo"](i / (count - 1))) for i in range(count)]


def _scatter(axes: Axes, panel: Panel, size: float | None = None) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color="0.8")
    axes.set_title(panel.title, fontsize=10)
    if size is None:
        size = 12 if len(panel.labels) <= 1000 else 6
    colours = [_UNKNOWN, *class_colours(len(panel.classes))]
    for number in range(-1, len(panel.classes)):  # what is not known lies below
        own = panel.points[panel.labels == number].numpy()
        if len(own):
            axes.scatter(own[:, 0], own[:, 1], s=size, color=colours[number + 1], marker=_marker(number),
                         alpha=0.75, linewidths=0)  # fmt: skip


def _marker(number: int) -> str:
    return _MARKERS[max(number, 0) % len(_MARKERS)]


def _legend(panel: Panel, width: float) -> dict[str, Any]:
    """Return a legend of a width in inches, with an entry for each class, or for none if they are too many."""
    colours = class_colours(len(panel.classes))
    entries = [(i, drawable(name), colours[i]) for i, name in enumerate(panel.classes)]
    entries = entries if len(entries) <= _NAMED else []
    if bool((panel.labels < 0).any()):
        entries.append((-1, "not known", _UNKNOWN))
    longest = max((len(name) for _, name, _ in entries), default=1)
    handles = [Line2D([], [], linestyle="", marker=_marker(i), color=colour, label=name, markersize=5)
               for i, name, colour in entries]  # fmt: skip
    fit = max(1, int(width * 72 / (_LEGEND_POINTS * 0.6 * (longest + 5))))  # a letter is 0.6 of its size wide
    rows = max(1, -(-len(handles) // fit))
    return {"handles": handles, "ncols": max(1, -(-len(handles) // rows)), "fontsize": _LEGEND_POINTS,
            "handletextpad": 0.2}  # fmt: skip
