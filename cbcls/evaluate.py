"""Measure a trained classifier, and audit what it is given: ``python -m cbcls.evaluate --run runs/cbcls/NAME``."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from common.runtime.atomic import write_text_atomic
from common.runtime.cli import flatten, parse, shown, to_dict
from common.runtime.command import run_command
from common.runtime.device import resolve_device
from common.runtime.errors import UsageError
from common.runtime.fields import changeable
from common.runtime.paths import refuse_overwriting
from common.train.config import NOT_STORED
from common.train.run_dir import environment

_SPLITS = ("test", "validation")
_WEAKEST = 3


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
    evaluation = Evaluator(model.cfg, images, device)
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
        logits = {split: evaluation.logits(model.network, images[split]) for split in _SPLITS if split in images}
        audit = None
        if model.clusters:
            theirs = None if baseline is None else _logits(baseline, images)
            audit = evaluation.audit(model.network, known=logits["test"], baseline=theirs)
    for split, found in logits.items():
        record[split] = _measured(images[split], found)
        draw(out, split, record[split])
        _print_scores(split, model, record[split])
    if audit is not None:
        record["leak_audit"] = audit.plain() | {"clusters": clusters_origin(model.cfg.clusters)}
        if baseline is not None:
            record["leak_audit"]["baseline"] |= {"run": str(options.baseline), "differs": differ}
        print("leak audit", *audit.lines(), *(f"note       the baseline has {line}" for line in differ), sep="\n")
    write_text_atomic(file, json.dumps(record, indent=2) + "\n")
    print(f"results    {out}")


def _logits(model: TrainedClassifier, images: Mapping[str, ImageSet]) -> Tensor:
    device = next(model.network.parameters()).device
    with evaluating(model.network):
        return Evaluator(model.cfg, images, device).logits(model.network, images["test"])


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


def _print_scores(split: str, model: TrainedClassifier, values: dict[str, Any]) -> None:
    top5 = "" if values["top5"] is None else f", top-5 {values['top5']:.3f}"
    accuracy = f"accuracy {values['accuracy']:.3f}{top5}, loss {values['loss']:.4g}, ECE {_error(values):.3f}"
    rows = {f"{split}": f"{accuracy} ({values['count']:,} images, epoch {model.epoch})"}
    for average in ("macro", "weighted"):
        rows[average] = ", ".join(f"{name} {value:.3f}" for name, value in values[average].items())
    counted = values["threshold"]["logits"]
    rows["> 0.5"] = (
        f"of raw logits, as Keras counts: precision {counted['precision']:.3f}, recall {counted['recall']:.3f}, "
        f"{counted['positives']:.3g} classes an image"
    )
    known = {name: row["recall"] for name, row in values["classes"].items() if row["count"]}
    weakest = sorted(known, key=lambda name: known[name])[:_WEAKEST]
    rows["weakest"] = "recall of " + ", ".join(f"{name} {known[name]:.3f}" for name in weakest)
    print("\n".join(f"{name:10} {text}" for name, text in rows.items()))


def _error(values: dict[str, Any]) -> float:
    return values["calibration"]["error"]


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
    differ = list(_unlike(model.cfg, baseline.cfg))
    for name, ours, theirs in differ:
        if name.startswith(("model.", "data.", "clusters.")):
            raise UsageError(f"baseline: expected {name} {shown(ours)} as {options.run} has, got {shown(theirs)}")
    # Runs of other seeds hold other images out of training, so that there only those for testing have to be the same.
    ends = ("_test", "_train") if model.cfg.seed == baseline.cfg.seed else ("_test",)
    for name, value in model.protocol.items():
        if name.endswith(ends) and name in baseline.protocol and baseline.protocol[name] != value:
            raise UsageError(f"baseline: {options.baseline} has other images or clusters than {options.run} ({name})")
    if model.epoch != baseline.epoch:
        differ.append(("epoch", model.epoch, baseline.epoch))
    return [f"{name} {shown(theirs)}, the model {shown(ours)}" for name, ours, theirs in differ]


def _unlike(ours: ClassifierConfig, theirs: ClassifierConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yield the settings in which two configurations differ, apart from the layer and from what changes nothing."""
    aside = {*NOT_STORED, *changeable(ClassifierConfig), "init_from", "model.onehot_cluster", "model.position"}
    other = dict(flatten(to_dict(theirs.resolved())))
    for name, value in flatten(to_dict(ours.resolved())):
        if name not in aside and not name.startswith("norm.") and other.get(name) != value:
            yield name, value, other.get(name)


if __name__ == "__main__":
    run_command(main)
