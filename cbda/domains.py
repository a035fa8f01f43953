"""The two domains' images, with one numbering of classes."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from cbda.config import AdaMatchConfig, DomainConfig
from common.data import ImageSet, Splits, Stream, load
from common.runtime.errors import UsageError
from common.runtime.seeding import permutation


def load_domains(cfg: AdaMatchConfig) -> dict[str, ImageSet]:
    """Return the images of a run: train and test of the source, target and target_test, and target_labelled.

    Labels of the target count classes as the source does, by name. The target's training images stand in for test
    images where it has labels but none of those; then nothing is held apart from training, which AdaMatch sees without
    labels. Without test images there is no entry for them.

    Raises:
        UsageError: if images cannot be had, the source, test images or what was asked for have no labels, or classes
            do not match.
    """
    source, target = _load(cfg.source, cfg.data.size), _load(cfg.target, cfg.data.size)
    train = source.train
    if train.labels is None:
        raise UsageError(f"source.root: {train.name} has no labels; the source needs one sub-folder a class")
    if train.num_classes < 2:
        raise UsageError(f"source.root: expected at least 2 classes, {train.name} has {train.num_classes}")
    for domain, test in ((cfg.source, source.test), (cfg.target, target.test)):
        if test is not None and test.labels is None:
            raise UsageError(
                f"{domain.domain}.test_root: {test.name} has no labels; test images need one sub-folder a class"
            )
    images = {"train": train if cfg.source.labels_per_class is None else _some(train, cfg.source, cfg.seed)}
    if source.test is not None:
        images["test"] = _as_counted(source.test, train.classes, cfg.source)
    images["target"] = _as_counted(target.train, train.classes, cfg.target)
    labelled = target.test if target.test is not None else target.train
    if labelled.labels is not None:
        images["target_test"] = _as_counted(labelled, train.classes, cfg.target)
    if cfg.target.labels_per_class is not None:
        if target.train.labels is None:
            raise UsageError(
                f"target.labels_per_class: expected null, since {target.train.name} has no labels, got "
                f"{cfg.target.labels_per_class}"
            )
        images["target_labelled"] = _some(images["target"], cfg.target, cfg.seed)
    return images


def domain_streams(cfg: AdaMatchConfig, images: Mapping[str, ImageSet], world: int) -> dict[str, Stream]:
    """Return what a process among ``world`` draws from: "train", "target" and, if there are any, "target_labelled".

    Each image is seen weakly and strongly augmented. Labelled images that do not fill a step are repeated until they
    do, each time in another view.

    Raises:
        UsageError: if the target has fewer images than a step takes.
    """
    views = cfg.data.view("weak", cfg.data.size), cfg.data.view("strong", cfg.data.size)
    labelled, target = cfg.batch_size * world * cfg.grad_accum_steps, images["target"]
    if labelled * cfg.target_ratio > len(target):
        raise UsageError(
            f"batch_size: expected at most the {len(target)} images of the target, got {labelled * cfg.target_ratio} "
            "a step"
        )
    streams = {
        name: Stream(_repeated(images[name], labelled), cfg.batch_size, views)
        for name in ("train", "target_labelled")
        if name in images
    }
    return streams | {"target": Stream(target, cfg.batch_size * cfg.target_ratio, views)}


def _repeated(images: ImageSet, count: int) -> ImageSet:
    """Return the images as often as it takes to have ``count`` of them."""
    if len(images) >= count:
        return images
    return images.select(torch.arange(len(images)).repeat(-(-count // len(images))))


def _load(domain: DomainConfig, size: int) -> Splits:
    try:
        return load(domain.data(size))
    except UsageError as error:
        message = domain.own(str(error))
        raise UsageError(message.replace(f"{domain.domain}.size", "data.size")) from None


def _as_counted(images: ImageSet, classes: tuple[str, ...], domain: DomainConfig) -> ImageSet:
    """Number labels by a list of class names.

    Raises:
        UsageError: if a class is not on it.
    """
    if images.labels is None:
        return images
    unknown = [name for name in images.classes if name not in classes]
    if unknown:
        raise UsageError(
            f"{domain.domain}.name: {images.name} has classes that the source has not ({_listed(unknown)}); expected "
            f"some of {_listed(classes)}"
        )
    number = torch.tensor([classes.index(name) for name in images.classes])
    return replace(images, labels=number[images.labels], classes=classes)


def _listed(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} others" if len(names) > 10 else "")


def _some(images: ImageSet, domain: DomainConfig, seed: int) -> ImageSet:
    """Choose so many images of each class that there are, which follow from (seed, domain, class).

    Raises:
        UsageError: if a class has fewer.
    """
    assert images.labels is not None
    assert domain.labels_per_class is not None
    chosen = []
    for label in images.labels.unique().tolist():
        members = (images.labels == label).nonzero()[:, 0]
        if len(members) < domain.labels_per_class:
            raise UsageError(
                f"{domain.domain}.labels_per_class: expected at most the {len(members)} images of class "
                f"{images.classes[label]}, got {domain.labels_per_class}"
            )
        order = permutation(len(members), seed, "labelled", domain.domain, label)
        chosen.append(members[order[: domain.labels_per_class]])
    return images.select(torch.cat(chosen).sort().values)
