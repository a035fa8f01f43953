"""Adapted classifiers apart from their runs: read from a run or a folder of their own, and written to one."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cbda.config import AdaMatchConfig
from cbda.domains import load_domains
from cbda.evaluation import CLASSES, CLUSTERS, clusters_of
from cbda.models import build_classifier
from cbda.networks.classifier import Classifier, evaluating
from common.cli.arguments import parse, to_dict, to_yaml
from common.data import to_float
from common.errors import UsageError
from common.machine.atomic import write_atomic, write_text_atomic
from common.metrics.logits import classify
from common.networks.pixels import pixels_of
from common.runs.checkpoint import Checkpoints
from common.training.parts import upgraded

_WEIGHTS, _FACTS, _CONFIG = "model.safetensors", "model.json", "config.yaml"


@dataclass(frozen=True, eq=False)
class AdaptedModel:
    """A classifier that was adapted, with what its use needs.

    Attributes:
        classifier: in evaluation mode.
        cfg: the configuration of its run.
        classes: names, in the order of the logits.
        threshold: of confidence, that pseudo-labels last had to reach.
    """

    classifier: Classifier
    cfg: AdaMatchConfig
    classes: tuple[str, ...]
    threshold: float

    def logits(self, images: Tensor, cluster: str = "target") -> Tensor:
        """Return logits (N, C), float64, of uint8 images (N, 3, S, S) as members of a cluster.

        Args:
            images: of the side S that the run had, ``cfg.data.size``.
            cluster: source, target or unknown; without meaning where the layer asks for none.

        Raises:
            UsageError: if the layer cannot be told this cluster.
        """
        known = clusters_of(self.cfg.norm.kind)
        if cluster not in CLUSTERS or (len(known) > 1 and cluster not in known):
            raise UsageError(f"cluster: expected {' or '.join(known)} of {self.cfg.norm.kind}, got {cluster}")
        device = next(self.classifier.parameters()).device

        def classifier(batch: Tensor) -> Tensor:
            x = pixels_of(to_float(batch.to(device)), self.cfg.model.pixels)
            return self.classifier(x, torch.full((len(batch),), CLUSTERS[cluster], device=device))

        with evaluating(self.classifier):
            return classify(classifier, images, len(self.classes), batch_size=256)

    def save(self, folder: Path) -> None:
        """Write weights, configuration and classes to a folder that `load_model` reads.

        Raises:
            UsageError: if the folder holds a model already.
        """
        from safetensors.torch import save  # noqa: PLC0415 - as timm's weights, only where it is needed

        if (folder / _WEIGHTS).exists():
            raise UsageError(f"out: {folder} holds a model already; choose another folder")
        state = {name: value.contiguous().cpu() for name, value in self.classifier.state_dict().items()}
        write_atomic(folder / _WEIGHTS, lambda file: file.write(save(state)))
        write_text_atomic(folder / _CONFIG, to_yaml(to_dict(self.cfg)))
        write_text_atomic(folder / _FACTS, json.dumps({"classes": self.classes, "threshold": self.threshold}) + "\n")


def load_model(path: Path | str, device: torch.device | str = "cpu") -> AdaptedModel:
    """Load an adapted classifier from a run's folder (its newest checkpoint) or from one that `save` wrote.

    Nothing but tensors is read from files of weights, and nothing is unpickled.

    Raises:
        UsageError: if the folder is neither, or its files do not belong together.
    """
    folder = Path(path)
    if not (folder / _CONFIG).is_file():
        raise UsageError(f"run: {folder} is no run's folder, nor an exported model's (it holds no {_CONFIG})")
    cfg = parse(AdaMatchConfig, ["--config", str(folder / _CONFIG)])
    state, classes, threshold = _exported(folder) if (folder / _WEIGHTS).is_file() else _trained(folder, cfg)
    # Weights come from the file, not from wherever training started.
    plain = replace(cfg, model=replace(cfg.model, weights=None, pretrained=False))
    network = build_classifier(plain, len(classes))
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).split(":", maxsplit=1)[0]
        raise UsageError(f"run: the weights in {folder} are not of its {_CONFIG} ({reason})") from None
    return AdaptedModel(network.eval().to(device), cfg, classes, threshold)


def _exported(folder: Path) -> tuple[dict[str, Tensor], tuple[str, ...], float]:
    from safetensors import SafetensorError  # noqa: PLC0415 - as above
    from safetensors.torch import load_file  # noqa: PLC0415

    try:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        return load_file(folder / _WEIGHTS), tuple(facts["classes"]), float(facts["threshold"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"run: {folder} cannot be read as an exported model ({error})") from None


def _trained(folder: Path, cfg: AdaMatchConfig) -> tuple[dict[str, Any], tuple[str, ...], float]:
    state, _ = Checkpoints(folder / "checkpoints").load_latest()
    if state is None:
        raise UsageError(f"run: {folder} has no checkpoint yet")
    state = upgraded(state)
    names = folder / CLASSES
    classes = json.loads(names.read_text(encoding="utf-8")) if names.is_file() else load_domains(cfg)["train"].classes
    weights = state["averages"].get("adamatch", state["networks"]["adamatch"])
    return weights, tuple(classes), float(state["networks"]["alignment"]["threshold"])
