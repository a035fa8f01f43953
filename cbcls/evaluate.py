"""Measure a trained classifier, and audit what it is given: ``python -m cbcls.evaluate --run runs/cbcls/NAME``."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cbcls.config import ClassifierConfig
from cbcls.evaluation import Evaluator
from cbcls.export import TrainedClassifier, load_model
from cbcls.task import ClassifierTask
from common.classification.measured import draw, measured
from common.classification.stored import run_folder
from common.data import ImageSet
from common.data.clusters import clusters_origin
from common.metrics.logits import evaluating
from common.metrics.scores import classification_scores, keras_threshold
from common.reports.densities import channel_moments
from common.reports.embedding import collect_features
from common.runtime.atomic import write_text_atomic
from common.runtime.cli import flatten, parse, shown, to_dict
from common.runtime.command import run_command
from common.runtime.device import resolve_device
from common.runtime.errors import UsageError
from common.runtime.fields import changeable
from common.runtime.paths import refuse_overwriting
from common.runtime.seeding import permutation
from common.train.config import NOT_STORED
from common.train.run_dir import environment

_SPLITS = ("test", "validation")
_WEAKEST = 3
_NEIGHBOURS, _MOST = 10, 1000


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure a trained classifier on the test images of its run, and on the validation images if it had any.

    Writes evaluation.json (accuracy, top-5, macro and weighted precision, recall and F1, a row for each class,
    confusion, calibration, what a threshold of 0.5 counts, the leak audit of a classifier that is given clusters), and
    pictures of confusion and reliability.
    """

    run: Path | None = None
    """A run's folder, for instance runs/cbcls/digits-ucb-seed0, or an exported model's."""
    checkpoint: str = "last"
    """Which checkpoint of the run: last, best, or the number of an epoch that was kept (checkpoint_keep)."""
    baseline: Path | None = None
    """A run that is given the same clusters without such a layer (model.onehot_cluster true, norm.kind bn or none), to
    compare with."""
    out: Path | None = None
    """Where results go; null is the folder evaluation in that of the run."""
    force: bool = False
    """Write over results that are there."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:n."""

    def __post_init__(self) -> None:
        if self.run is None:
            raise ValueError("run: give the run's folder, --run runs/cbcls/NAME")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError: if there is no such run, its images are not there or have changed, the baseline is not like it, or
            results are in the way.
    """
    options = parse(EvaluateConfig, argv, prog="python -m cbcls.evaluate")
    assert options.run is not None  # EvaluateConfig refuses otherwise
    out = options.out or run_folder(options.run) / "evaluation"
    file = out / "evaluation.json"
    refuse_overwriting(file, force=options.force)
    device = resolve_device(options.device)
    model = load_model(options.run, device, checkpoint=options.checkpoint)
    baseline = None if options.baseline is None else load_model(options.baseline, device)
    differ = [] if baseline is None else _differences(model, baseline, options)
    images = ClassifierTask.load_images(model.cfg)
    evaluator = Evaluator(model.cfg, images, device)
    _check_images(model, images)
    record: dict[str, Any] = {
        "run": str(options.run),
        "checkpoint": options.checkpoint,
        "epoch": model.epoch,
        "settings": to_dict(model.cfg),
        "images": {name: each.content_hash for name, each in images.items()},
        "environment": environment(device),
    }
    with evaluating(model.network):
        logits = {name: evaluator.logits(model.network, images[name]) for name in _SPLITS if name in images}
        theirs = None
        if baseline is not None:
            with evaluating(baseline.network):
                theirs = Evaluator(baseline.cfg, images, device).logits(baseline.network, images["test"])
        audit = evaluator.audit(model.network, logits["test"], theirs) if model.clusters else None
    record["values"] = distributions(model, images["test"])
    for split, found in logits.items():
        record[split] = _measured(images[split], found)
        draw(out, split, record[split])
        _print_scores(split, model.epoch, record[split])
    if audit is not None:
        record["leak_audit"] = audit.plain() | {"clusters": clusters_origin(model.cfg.clusters)}
        if baseline is not None:
            record["leak_audit"]["baseline"] |= {"run": str(options.baseline), "differs": differ}
        print("leak audit", *audit.lines(), *(f"note       the baseline has {line}" for line in differ), sep="\n")
    write_text_atomic(file, json.dumps(record, indent=2) + "\n")
    print(f"results    {out}")


def distributions(model: TrainedClassifier, images: ImageSet) -> dict[str, float]:
    """Return how features group up to 1,000 images by class, and how activations differ from normal ones.

    ``features/purity``: of the ten nearest neighbours of an image's features, the share of its class, mean over images.
    ``features/silhouette``: of features by class (Rousseeuw, 1987), -1 to 1. ``activations/``: of the shallow CNN's
    second convolution, means over channels of |skewness|, excess kurtosis and distance from a normal distribution.
    """
    from sklearn.metrics import silhouette_score  # noqa: PLC0415 - scikit-learn takes a second, a mistyped flag none
    from sklearn.neighbors import NearestNeighbors  # noqa: PLC0415

    images = images.select(permutation(len(images), model.cfg.seed, "distributions")[:_MOST])
    assert images.labels is not None
    conv2, outputs = dict(model.network.named_modules()).get("conv2"), []
    with ExitStack() as stack:
        features = stack.enter_context(collect_features(model.network))
        if conv2 is not None:
            stack.enter_context(conv2.register_forward_hook(lambda _layer, _args, y: outputs.append(y.float().cpu())))
        model.logits(images.images, images.clusters if model.clusters and images.clusters is not None else "unknown")
    points, labels = torch.cat(features).numpy(), images.labels.numpy()
    neighbours = NearestNeighbors(n_neighbors=min(_NEIGHBOURS, len(points) - 1)).fit(points).kneighbors()[1]
    values = {
        "features/purity": float((labels[neighbours] == labels[:, None]).mean()),
    }
    if 1 < len(set(labels.tolist())) < len(labels):
        values["features/silhouette"] = float(silhouette_score(points, labels))
    if outputs:
        found = channel_moments(torch.cat(outputs).movedim(1, -1).flatten(0, -2))
        values |= {f"activations/{name}": getattr(found, name) for name in ("skewness", "kurtosis", "distance")}
    return values


def _measured(images: ImageSet, logits: Tensor) -> dict[str, Any]:
    """Return what `measured` does, with what classifiers of many classes are asked for besides."""
    assert images.labels is not None
    values = measured(images.labels, logits, images.classes)
    for row in values["classes"].values():
        total = row["precision"] + row["recall"]
        row["f1"] = 2 * row["precision"] * row["recall"] / total if total else 0.0
    counted = {}
    for name, scores in (("logits", logits), ("probabilities", logits.softmax(1))):
        pair = keras_threshold(scores, images.labels)
        counted[name] = {**pair._asdict(), "positives": float((scores > 0.5).sum() / len(scores))}
    top5 = classification_scores(images.labels, logits, images.num_classes).top5
    return {"error": 1 - values["accuracy"], "top5": top5, "threshold": counted, **values}


def _print_scores(split: str, epoch: int, values: dict[str, Any]) -> None:
    top5 = "" if values["top5"] is None else f", top-5 {values['top5']:.3f}"
    counted = values["threshold"]["logits"]
    known = {name: row["recall"] for name, row in values["classes"].items() if row["count"]}
    weakest = sorted(known, key=lambda name: known[name])[:_WEAKEST]
    rows = {
        split: f"accuracy {values['accuracy']:.3f}{top5}, loss {values['loss']:.4g}, "
        f"ECE {values['calibration']['error']:.3f} ({values['count']:,} images, epoch {epoch})",
        **{average: ", ".join(f"{name} {value:.3f}" for name, value in values[average].items())
           for average in ("macro", "weighted")},
        "> 0.5": f"of raw logits, as Keras counts: precision {counted['precision']:.3f}, recall "
        f"{counted['recall']:.3f}, {counted['positives']:.3g} classes an image",
        "weakest": "recall of " + ", ".join(f"{name} {known[name]:.3f}" for name in weakest),
    }  # fmt: skip
    for name, text in rows.items():
        print(f"{name:10} {text}")


def _check_images(model: TrainedClassifier, images: dict[str, ImageSet]) -> None:
    """Raise UsageError if images or clusters are not those of the run."""
    if images["train"].classes != model.classes:
        raise UsageError(f"run: {model.cfg.data.name} has other classes now than the model knows")
    now = {f"content_{name}": each.content_hash for name, each in images.items()}
    now |= {f"clusters_{name}": each.clusters_hash for name, each in images.items()}
    differ = [name for name, value in model.protocol.items() if name in now and now[name] != value]
    if differ:
        raise UsageError(f"run: its images are others now ({', '.join(differ)} differ); restore them, or train anew")


def _differences(model: TrainedClassifier, baseline: TrainedClassifier, options: EvaluateConfig) -> list[str]:
    """Return the settings in which a baseline differs and may, each with the two values.

    Raises:
        UsageError: if model or baseline is given no clusters, or they differ in model, data or clusters.
    """
    if not model.clusters:
        raise UsageError(f"baseline: {options.run} is given no clusters, so nothing is to be compared; leave it out")
    if not baseline.cfg.model.onehot_cluster:
        raise UsageError(
            f"baseline: expected a run with model.onehot_cluster true, got {options.baseline} with norm.kind "
            f"{baseline.cfg.norm.kind} and without it"
        )
    aside = {*NOT_STORED, *changeable(ClassifierConfig), "init_from", "model.onehot_cluster", "model.position"}
    ours, theirs = (dict(flatten(to_dict(each.cfg.resolved()))) for each in (model, baseline))
    differ = [
        name for name in ours if name not in aside and not name.startswith("norm.") and ours[name] != theirs[name]
    ]
    for name in differ:
        if name.startswith(("model.", "data.", "clusters.")):
            raise UsageError(
                f"baseline: expected {name} {shown(ours[name])} as {options.run} has, got {shown(theirs[name])}"
            )
    # Runs of other seeds hold other images out of training, so that there only those for testing have to be the same.
    ends = ("_test", "_train") if model.cfg.seed == baseline.cfg.seed else ("_test",)
    for name, value in model.protocol.items():
        if name.endswith(ends) and name in baseline.protocol and baseline.protocol[name] != value:
            raise UsageError(f"baseline: {options.baseline} has other images or clusters than {options.run} ({name})")
    lines = [f"{name} {shown(theirs[name])}, the model {shown(ours[name])}" for name in differ]
    return lines + [f"epoch {baseline.epoch}, the model {model.epoch}"] * (model.epoch != baseline.epoch)


if __name__ == "__main__":
    run_command(main)
