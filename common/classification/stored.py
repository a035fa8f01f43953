"""Trained networks apart from their runs: read from a run's folder or an exported one, and exported to one."""

import json
import sys
import typing
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from common.runtime.atomic import write_atomic, write_text_atomic
from common.runtime.cli import to_dict, to_yaml
from common.runtime.device import memory_format
from common.runtime.errors import UsageError
from common.train.checkpoint import Checkpoints, DamagedCheckpoint, load
from common.train.config import RunConfig, stored_config

C = TypeVar("C", bound=RunConfig)
M = TypeVar("M", bound="StoredModel[Any]")
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
class StoredModel(Generic[C]):
    """A trained network apart from its run.

    The fields that an application's model adds are facts: `save` writes them, `Stored.model` reads them again.

    Attributes:
        network: in evaluation mode.
        cfg: the configuration of its run.
    """

    network: nn.Module
    cfg: C

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def save(self, folder: Path) -> None:
        """Write weights (safetensors), configuration and facts to a folder, which is loaded as a run is.

        Raises:
            UsageError: if the folder holds a model already.
        """
        from safetensors.torch import save  # noqa: PLC0415 - as timm's weights, only where it is needed

        check_free(folder)
        weights = {name: value.contiguous().cpu() for name, value in self.network.state_dict().items()}
        facts = {name: getattr(self, name) for name in _facts(type(self))}
        write_text_atomic(folder / _CONFIG, to_yaml(to_dict(self.cfg)))
        write_text_atomic(folder / _FACTS, json.dumps(facts) + "\n")
        write_atomic(folder / _WEIGHTS, lambda file: file.write(save(weights)))  # last: it makes the folder a model's


@dataclass(frozen=True, eq=False)
class Stored(Generic[C]):
    """A trained network as files hold it.

    Attributes:
        folder: where it was read.
        cfg: the configuration of its run.
        weights: parameters and buffers by name: the average's, where the run keeps one, and the statistics by which
            the run measured them.
        facts: what an exported folder says beside the configuration; None of a run.
        state: the checkpoint of a run; empty of an exported folder.
        recalibrated: whether statistics are those that the network is measured by; not so in a checkpoint of a run
            that did not measure it.
    """

    folder: Path
    cfg: C
    weights: dict[str, Tensor]
    facts: Mapping[str, Any] | None
    state: Mapping[str, Any]
    recalibrated: bool

    def fact(self, name: str, kind: Callable[[Any], T]) -> T:
        """Return one of an exported folder's facts, brought to its type.

        Raises:
            UsageError: if the folder does not say it.
        """
        try:
            return kind((self.facts or {})[name])
        except (KeyError, TypeError, ValueError) as error:
            raise _unreadable(self.folder, error) from None

    @property
    def exported(self) -> bool:
        """Whether it is an exported folder's, not a run's."""
        return self.facts is not None

    def noted(self, name: str, read: Callable[[Any], T], otherwise: Callable[[], T] | None = None) -> T:
        """Return what ``read`` makes of a JSON file in a run's folder; without the file, what ``otherwise`` finds.

        Raises:
            UsageError: if the file is damaged, or missing and there is no ``otherwise``.
        """
        file = self.folder / name
        if otherwise is not None and not file.is_file():
            return otherwise()
        try:
            return read(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            remedy = "restore it" if otherwise is None else "remove it, and names are taken from the images"
            raise UsageError(f"run: {file} cannot be read ({error}); {remedy}") from None

    def model(
        self,
        kind: type[M],
        of_run: Callable[[], Mapping[str, Any]],
        build: Callable[[Mapping[str, Any]], nn.Module],
    ) -> M:
        """Return the network with its weights, in evaluation mode, and its facts.

        Args:
            kind: the application's model.
            of_run: returns a run's facts; an exported folder holds its own.
            build: makes the network from the facts.

        Raises:
            UsageError: if facts are missing, or the weights are not those of such a network.
        """
        facts = {name: self.fact(name, type_) for name, type_ in _facts(kind).items()} if self.exported else of_run()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of how it trains, which its run has printed
            network = build(facts)
        self.load_into(network)
        return kind(network.eval(), self.cfg, **facts)

    def load_into(self, network: nn.Module) -> None:
        """Give a network the weights, in the run's memory layout.

        Raises:
            UsageError: if they are not those of such a network.
        """
        try:
            network.load_state_dict(self.weights)
        except RuntimeError as error:
            reason = str(error).split(":", maxsplit=1)[0]
            raise UsageError(f"run: the weights in {self.folder} are not of its {_CONFIG} ({reason})") from None
        network.to(memory_format=memory_format(self.cfg.channels_last))  # pyright: ignore[reportCallIssue]


def read_stored(
    kind: type[C], path: Path | str, network: str, checkpoint: str = "last", *, average: bool = True
) -> Stored[C]:
    """Read a network from a run's folder or from one that `StoredModel.save` wrote; nothing but tensors is unpickled.

    Args:
        kind: the class of the run's configuration.
        path: the folder, or a file in the folder ``checkpoints`` of a run.
        network: its name among the networks of a run.
        checkpoint: of a run: last, best, or a kept epoch (``checkpoint_keep``); an exported folder has one alone.
        average: of a run that keeps an average of weights (``ema_decay``), take that.

    Raises:
        UsageError: if the folder is neither, its run has no such checkpoint or network, or a file is damaged.
    """
    folder, file = run_folder(Path(path)), Path(path) if Path(path).is_file() else None
    if file is not None and checkpoint != "last":
        raise UsageError(
            f"checkpoint: {file} is one itself, got {checkpoint} too; leave it out, or name the run's folder"
        )
    if not (folder / _CONFIG).is_file():
        raise UsageError(f"run: {folder} is no run's folder, nor an exported model's (it holds no {_CONFIG})")
    if (folder / _WEIGHTS).is_file():
        if checkpoint != "last":
            raise UsageError(f"checkpoint: {folder} holds an exported model, which has no {checkpoint}; leave it out")
        weights, facts = _exported(folder)
        return Stored(folder, stored_config(kind, folder), weights, facts, {}, recalibrated=True)
    state = _checkpoint(folder, checkpoint) if file is None else _load(file)
    if network not in state["networks"]:
        held = ", ".join(state["networks"])
        raise UsageError(f"run: {folder} holds the networks {held}, no {network}; expected a run of this command's")
    raw = state["networks"][network]
    weights = state["averages"].get(network, raw) if average else raw
    # Weights as trained are not what was measured where there is an average of them.
    statistics = state["statistics"].get(network) if average or network not in state["averages"] else None
    measured = {**weights, **(statistics or {})}
    return Stored(folder, stored_config(kind, folder), measured, None, state, recalibrated=statistics is not None)


def run_folder(path: Path) -> Path:
    """Return a run's folder, named by itself or by a file in its folder ``checkpoints``."""
    return path.resolve().parent.parent if path.is_file() else path


def _facts(kind: type[StoredModel[Any]]) -> dict[str, Callable[[Any], Any]]:
    """Return the names of a model's facts, each with what brings a value of JSON to its type."""
    hints = typing.get_type_hints(kind)
    names = [field.name for field in fields(kind) if field.name not in ("network", "cfg")]
    return {name: typing.get_origin(hints[name]) or hints[name] for name in names}


def check_free(folder: Path) -> None:
    """Raise UsageError if a folder for an exported model holds one already."""
    if (folder / _WEIGHTS).exists():
        raise UsageError(f"out: {folder} holds a model already; choose another folder")


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
