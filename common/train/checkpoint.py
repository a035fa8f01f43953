"""Checkpoints: written whole or not at all, verified when read, plain values only."""

import io
import re
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.runtime.atomic import write_atomic
from common.runtime.errors import UsageError

SCHEMA = 4
"""Version of the layout; files of another one are refused."""


class DamagedCheckpoint(Exception):
    """A checkpoint file is truncated, altered, or not one of ours."""


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint of state dicts and plain values atomically."""
    buffer = io.BytesIO()  # serialised first: a state that cannot be saved must not cost the file that stands
    torch.save({"schema": SCHEMA, **state}, buffer)
    write_atomic(path, lambda file: file.write(buffer.getbuffer()))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint, tensors on the CPU.

    Every record's CRC-32 is compared first, which finds truncation and single flipped bits; only tensors and
    plain values are unpickled.

    Raises:
        DamagedCheckpoint: if the file is not whole or not one of ours.
        UsageError: if it has another layout than this version writes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (record := archive.testzip()) is not None:
                raise DamagedCheckpoint(f"{path}: checksum of {record} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, zipfile.BadZipFile, EOFError, RuntimeError, ValueError, KeyError) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [repr(error)])[0]
        raise DamagedCheckpoint(f"{path}: {reason}") from None
    except Exception as error:  # the unpickler raises its own types for code and unknown globals
        raise DamagedCheckpoint(f"{path}: holds more than tensors and plain values ({type(error).__name__})") from None
    if not isinstance(state, dict) or "schema" not in state:
        raise DamagedCheckpoint(f"{path}: not a checkpoint of this project")
    if state["schema"] != SCHEMA:
        raise UsageError(
            f"{path}: has layout {state['schema']}, this version reads layout {SCHEMA} alone; use the version that "
            "wrote it, or train anew"
        )
    return state


def load_weights(path: Path, networks: Mapping[str, nn.Module], averages: Mapping[str, nn.Module]) -> None:
    """Give networks, and the averages of them, the weights and buffers of another run's.

    Raises:
        UsageError: if the file is not a checkpoint, or its networks have other shapes.
    """
    try:
        state = load(path)["networks"]
        for name, network in (*networks.items(), *averages.items()):
            network.load_state_dict(state[name])
    except DamagedCheckpoint as error:
        raise UsageError(f"init_from: {error}; expected a run's checkpoint, such as checkpoints/best.pt") from None
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"init_from: {path} does not fit this configuration ({reason}); expected a checkpoint of a run "
            "with the same networks and layers"
        ) from None


class Checkpoints:
    """The checkpoints of one run: the newest two and the best.

    Files are ``step-00000900.pt``, ``best.pt`` and, for epochs that are kept, ``epoch-0025.pt`` in ``folder``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def best(self) -> Path:
        """The file of the best checkpoint (it may not exist yet)."""
        return self.folder / "best.pt"

    def paths(self) -> list[Path]:
        """Return the numbered checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob("step-*.pt") if re.fullmatch(r"step-\d+\.pt", p.name))

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        best: bool = False,
        keep: Iterable[int | None] = (),
        epoch: int | None = None,
    ) -> Path:
        """Write the checkpoint of a step, and remove those that are no longer kept.

        Args:
            step: steps done.
            state: as `TrainState.state_dict` returns it.
            best: write it as best.pt too.
            keep: steps whose checkpoints stay, however old.
            epoch: write it as this epoch's too, which stays for good.
        """
        path = self.path(step)
        save(path, state)
        for copy in ([self.best] if best else []) + ([] if epoch is None else [self.of_epoch(epoch)]):
            with path.open("rb") as source:
                write_atomic(copy, lambda file, source=source: shutil.copyfileobj(source, file))
        kept = {*self.paths()[-2:], *(self.path(step) for step in keep if step is not None)}
        for old in self.paths():
            if old not in kept:
                old.unlink()
        return path

    def drop_after(self, step: int) -> None:
        """Remove the numbered checkpoints of later steps: the run has gone back to this one."""
        for path in self.paths():
            if path > self.path(step):
                path.unlink()

    def path(self, step: int) -> Path:
        """Return the file of a step's checkpoint."""
        return self.folder / f"step-{step:08d}.pt"

    def of_epoch(self, epoch: int) -> Path:
        """Return the file of a kept epoch's checkpoint."""
        return self.folder / f"epoch-{epoch:04d}.pt"

    def epochs(self) -> list[int]:
        """Return the epochs whose checkpoints are kept, in rising order."""
        return sorted(int(p.stem.removeprefix("epoch-")) for p in self.folder.glob("epoch-*.pt"))

    def remove_leftovers(self) -> None:
        """Remove what a process left that was killed in the middle of a write; only the run's own process may."""
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink()

    def load_latest(self, step: int | None = None) -> tuple[dict[str, Any] | None, list[str]]:
        """Read the newest checkpoint that is whole, of those up to a step if one is given.

        Returns:
            Its state, or None if the run has not saved one yet; and a line for each damaged file passed over.

        Raises:
            UsageError: if there are checkpoints and every one is damaged.
        """
        reports: list[str] = []
        for path in reversed(self.paths()):
            if step is not None and path > self.path(step):
                continue
            try:
                return load(path), reports
            except DamagedCheckpoint as error:
                reports.append(f"damaged checkpoint passed over: {error}")
        if reports:
            raise UsageError(f"resume: every checkpoint in {self.folder} is damaged; start anew under another --name")
        return None, reports
