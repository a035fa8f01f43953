"""Trained generators apart from their runs: read from a run or a folder of their own, and written to one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cbgan.config import GanConfig
from cbgan.evaluation import CLASSES, recalibrate
from cbgan.models import build_generator
from cbgan.networks.dcgan import Generator
from cbgan.noise import fixed_labels, numbered_noise
from common.classification.stored import StoredModel, read_stored
from common.data import to_uint8
from common.runtime.atomic import write_atomic
from common.runtime.device import autocast
from common.runtime.errors import UsageError
from common.runtime.paths import expanded

PROGRAM = "generator.pt2"
"""The generator as torch.export has it, for code that knows nothing of this project."""
_BATCH = 200
_CLOSE = 1e-4
"""Largest difference, of values in [-1, 1], that an exported program may have from the generator."""


@dataclass(frozen=True, eq=False)
class TrainedGenerator(StoredModel[GanConfig]):
    """A generator that was trained, with what its use needs.

    Attributes:
        network: in evaluation mode, with the statistics by which it is measured.
        cfg: the configuration of its run.
        classes: names of the classes it can be asked for; empty where it cannot.
        counts: training images of each class, by which classes are drawn where none is asked for.
        epoch: of the checkpoint.
    """

    network: Generator
    classes: tuple[str, ...]
    counts: tuple[int, ...]
    epoch: int

    @torch.no_grad()
    def images(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return uint8 images (N, 3, S, S), on the CPU, of noise (N, D) and, of a conditional one, classes (N,)."""
        inputs = (z,) if labels is None else (z, labels)
        made: list[Tensor] = []
        for batch in zip(*(each.split(_BATCH) for each in inputs), strict=True):
            with autocast(self.device, self.cfg.precision):
                made.append(to_uint8(self.network(*(each.to(self.device) for each in batch))).cpu())
        return torch.cat(made)

    def sample(
        self,
        count: int,
        seed: int = 0,
        classes: Sequence[str] = (),
        truncation: float | None = None,
        first: int = 0,
    ) -> Tensor:
        """Return uint8 images (count, 3, S, S) that follow from the seed and their numbers.

        Args:
            count: how many.
            seed: what they follow from.
            classes: names that are asked for in turn; none draws classes as frequent as in training.
            truncation: `cbgan.noise.numbered_noise`'s limit.
            first: the first one's number.

        Raises:
            UsageError: if there is no such class, or no class can be asked for.
        """
        z = numbered_noise(first, count, self.cfg.latent_dim, seed, truncation)
        return self.images(z, self.labels(count, classes, first))

    def labels(self, count: int, classes: Sequence[str] = (), first: int = 0) -> Tensor | None:
        """Return classes (count,) from the number ``first`` on: named ones in turn, or drawn ones; None where none are.

        Raises:
            UsageError: as `sample`.
        """
        if not self.classes:
            if classes:
                raise UsageError(
                    f"classes: a generator with {self.cfg.norm.kind} cannot be asked for any, got "
                    f"{', '.join(classes)}; leave them out, or take a run of --norm.kind scb"
                )
            return None
        if unknown := [name for name in classes if name not in self.classes]:
            raise UsageError(f"classes: expected some of {', '.join(self.classes)}, got {', '.join(unknown)}")
        if not classes:
            return fixed_labels(self.counts, first + count, torch.device("cpu"))[first:]
        asked = torch.tensor([self.classes.index(name) for name in classes])
        return asked[torch.arange(first, first + count) % len(asked)]

    def save(self, folder: Path) -> None:
        """Write weights, configuration and classes, and a program of torch.export, to a folder.

        What is written is read again and held against this generator: the weights give the same images bit for bit,
        the program the same values within rounding.

        Raises:
            UsageError: if the folder holds a model already.
        """
        example = self._example(2)
        program = torch.export.export(
            self.network, example, dynamic_shapes=tuple({0: torch.export.Dim("images", min=1)} for _ in example)
        )
        super().save(folder)
        write_atomic(folder / PROGRAM, lambda file: torch.export.save(program, file))  # pyright: ignore[reportArgumentType]
        example = self._example(5)
        with torch.no_grad():
            ours, theirs = self.network(*example), torch.export.load(folder / PROGRAM).module()(*example)
            again = load_generator(folder, device=self.device).network(*example)
        if not torch.equal(ours, again) or float((ours - theirs).abs().max()) > _CLOSE:
            raise RuntimeError(f"{folder}: what was written makes other images than the generator")

    def _example(self, count: int) -> tuple[Tensor, ...]:
        z, labels = numbered_noise(0, count, self.cfg.latent_dim, 0), self.labels(count)
        return tuple(t.to(self.device) for t in ((z,) if labels is None else (z, labels)))


def load_generator(
    path: Path | str,
    device: torch.device | str = "cpu",
    *,
    checkpoint: str = "last",
    raw: bool = False,
) -> TrainedGenerator:
    """Load a generator from a run's folder, one of its checkpoint files, or a folder that `save` wrote.

    Nothing but tensors is read from files of weights, and nothing is unpickled.

    Args:
        path: the folder or file.
        device: where it is to run.
        checkpoint: of a run's folder: last, best, or the number of an epoch that was kept.
        raw: take the weights as they were trained, where the run kept an average of them (``ema_decay``).

    Raises:
        UsageError: if it is neither, has no such checkpoint, its files do not belong together, or the layers' backend
            cannot run there.
    """
    stored = read_stored(GanConfig, path, "g", checkpoint, average=not raw)
    cfg = stored.cfg
    cfg.check_backend(torch.device(device))

    def names_and_counts(known: Any) -> dict[str, Any]:
        return {"classes": tuple(map(str, known["classes"])), "counts": tuple(map(int, known["counts"]))}

    def of_run() -> dict[str, Any]:
        known = stored.noted(CLASSES, names_and_counts) if cfg.conditional else {"classes": (), "counts": ()}
        return known | {"epoch": stored.state["run"]["epoch"]}

    model = stored.model(TrainedGenerator, of_run, lambda _: build_generator(cfg))
    if not stored.recalibrated:
        recalibrate(cfg, model.network, model.counts, torch.device("cpu"))
    return replace(model, network=model.network.requires_grad_(False).to(device))


def checkpoint_of(run: Path | None, checkpoint: str) -> tuple[Path | None, str]:
    """Return a path, None if none was given, and a checkpoint, as `load_generator` takes them.

    Args:
        run: a folder, or None.
        checkpoint: last, best, a kept epoch, or a file, which needs no run.

    Raises:
        UsageError: if the file lies in the folder of another run, whose configuration is another's.
    """
    file = expanded(checkpoint, "checkpoint")
    named = checkpoint in ("last", "best") or checkpoint.isdecimal()  # whatever files there are of such names
    if named or not file.is_file():
        return run, checkpoint
    if run is not None and file.resolve().parent.parent != expanded(run, "run").resolve():
        raise UsageError(f"checkpoint: expected one of {run}, got {checkpoint}; leave --run out")
    return file, "last"
