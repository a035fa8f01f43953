"""Trained networks apart from their runs: read from a run's folder or an exported one, and exported to one."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from common.cli.arguments import to_dict, to_yaml
from common.errors import UsageError
from common.machine.atomic import write_atomic, write_text_atomic
from common.runs.checkpoint import Checkpoints, DamagedCheckpoint, load
from common.training.config import RunConfig, stored_config

C = TypeVar("C", bound=RunConfig)
T = TypeVar("T")

_WEIGHTS, _FACTS, _CONFIG = "model.safetensors", "model.json", "config.yaml"


def check_images(images: Tensor, size: int) -> None:
    """Refuse images that a stored network would take for others: floats have no one range, and sizes say nothing.

    Raises:
        ValueError: unless they are uint8 (N, 3, size, size).
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
        raise ValueError(
            f"images: expected uint8 (N, 3, {size}, {size}), got {str(images.dtype).removeprefix('torch.')} "
            f"{tuple(images.shape)}"
        )


@dataclass(frozen=True, eq=False)
class Stored(Generic[C]):
    """A trained network as files hold it.

    Attributes:
        folder: where it was read.
        cfg: the configuration of its run.
        weights: parameters and buffers by name: the average's, where the run keeps one.
        facts: what an exported folder says beside the configuration; None of a run.
        state: the checkpoint of a run; empty of an exported folder.
    """

    folder: Path
    cfg: C
    weights: dict[str, Tensor]
    facts: Mapping[str, Any] | None
    state: Mapping[str, Any]

    def fact(self, name: str, kind: Callable[[Any], T]) -> T:
        """Return one of an exported folder's facts, brought to its type.

        Raises:
            UsageError: if the folder does not say it.
        """
        try:
            return kind((self.facts or {})[name])
        except (KeyError, TypeError, ValueError) as error:
            raise _unreadable(self.folder, error) from None

    def load_into(self, network: nn.Module) -> None:
        """Give a network the weights.

        Raises:
            UsageError: if they are not those of such a network.
        """
        try:
            network.load_state_dict(self.weights)
        except RuntimeError as error:
            reason = str(error).split(":", maxsplit=1)[0]
            raise UsageError(f"run: the weights in {self.folder} are not of its {_CONFIG} ({reason})") from None


def read_stored(
    kind: type[C], path: Path | str, network: str, checkpoint: str = "last", *, average: bool = True
) -> Stored[C]:
    """Read a network from a run's folder or from one that `export` wrote; nothing but tensors is unpickled.

    Args:
        kind: the class of the run's configuration.
        path: the folder, or a file in the folder ``checkpoints`` of a run.
        network: its name among the networks of a run.
        checkpoint: of a run: last, best, or a kept epoch (``checkpoint_keep``); an exported folder has one alone.
        average: of a run that keeps an average of weights (``ema``), take that.

    Raises:
        UsageError: if the folder is neither, its run has no such checkpoint or network, or a file is damaged.
    """
    folder, file = Path(path), None
    if folder.is_file():
        folder, file = folder.resolve().parent.parent, folder
    if not (folder / _CONFIG).is_file():
        raise UsageError(f"run: {folder} is no run's folder, nor an exported model's (it holds no {_CONFIG})")
    if (folder / _WEIGHTS).is_file():
        if checkpoint != "last":
            raise UsageError(f"checkpoint: {folder} holds an exported model, which has no {checkpoint}; leave it out")
        weights, facts = _exported(folder)
        return Stored(folder, stored_config(kind, folder), weights, facts, {})
    state = _checkpoint(folder, checkpoint) if file is None else _load(file)
    if network not in state["networks"]:
        held = ", ".join(state["networks"])
        raise UsageError(f"run: {folder} holds the networks {held}, no {network}; expected a run of this command's")
    raw = state["networks"][network]
    weights = state["averages"].get(network, raw) if average else raw
    return Stored(folder, stored_config(kind, folder), weights, None, state)


def check_free(folder: Path) -> None:
    """Raise UsageError if a folder for an exported model holds one already."""
    if (folder / _WEIGHTS).exists():
        raise UsageError(f"out: {folder} holds a model already; choose another folder")


def export(folder: Path, network: nn.Module, cfg: RunConfig, facts: Mapping[str, Any]) -> None:
    """Write weights (safetensors), configuration and facts to a folder that `read_stored` reads.

    Raises:
        UsageError: if the folder holds a model already.
    """
    from safetensors.torch import save  # noqa: PLC0415 - as timm's weights, only where it is needed

    check_free(folder)
    state = {name: value.contiguous().cpu() for name, value in network.state_dict().items()}
    write_text_atomic(folder / _CONFIG, to_yaml(to_dict(cfg)))
    write_text_atomic(folder / _FACTS, json.dumps(facts) + "\n")
    write_atomic(folder / _WEIGHTS, lambda file: file.write(save(state)))  # last: it makes the folder a model's


def _exported(folder: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    from safetensors import SafetensorError  # noqa: PLC0415 - as above
    from safetensors.torch import load_file  # noqa: PLC0415

    try:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        return load_file(folder / _WEIGHTS), dict(facts)
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise _unreadable(folder, error) from None


def _unreadable(folder: Path, error: Exception) -> UsageError:
    return UsageError(f"run: {folder} cannot be read as an exported model ({error})")


def _checkpoint(folder: Path, which: str) -> dict[str, Any]:
    checkpoints = Checkpoints(folder / "checkpoints")
    if which == "last":
        state, reports = checkpoints.load_latest()
        for report in reports:
            print(f"warning: {report}", file=sys.stderr)
        if state is None:
            raise UsageError(f"run: {folder} has no checkpoint yet")
        return state
    if which != "best" and not which.isdecimal():
        raise UsageError(f"checkpoint: expected last, best or the number of a kept epoch, got {which}")
    path = checkpoints.best if which == "best" else checkpoints.of_epoch(int(which))
    if not path.is_file():
        kept = ", ".join(["last", *(["best"] if checkpoints.best.is_file() else []), *map(str, checkpoints.epochs())])
        raise UsageError(f"checkpoint: {folder} has none of {which}; there are {kept}")
    return _load(path)


def _load(file: Path) -> dict[str, Any]:
    try:
        return load(file)
    except DamagedCheckpoint as error:
        raise UsageError(f"checkpoint: {error}") from None
