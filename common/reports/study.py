"""A study: experiments, each a command with arms of settings and seeds, as a YAML file."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from common.runtime.errors import UsageError


@dataclass(frozen=True)
class Experiment:
    """One command, run by arm and seed.

    Attributes:
        name: of the experiment.
        command: a module that trains: cbgan.train, cbda.adamatch or cbcls.train.
        arms: flags by arm; arms are compared with each other.
        seeds: which runs of arms are paired by.
        title: for a heading.
        flags: of all arms.
        clusters: flags of cbcls.clusters, which finds clusters first; ``{clusters}`` in the flags of arms is its file.
        evaluate: a command with flags that measures each run afterwards, such as cbcls.evaluate.
        threads: of a run.
        memory: of a run, MiB.
        minutes: of a run, to plan with.
        show: heading by tag, the values of the experiment's table.
        paper: the paper's numbers by arm and tag.
        notes: what differs from the paper, its errata, and what else has to be known.
    """

    name: str
    command: str
    arms: Mapping[str, str]
    seeds: tuple[int, ...]
    title: str = ""
    flags: str = ""
    clusters: str | None = None
    evaluate: str | None = None
    threads: int = 1
    memory: int = 2000
    minutes: float = 10
    show: Mapping[str, str] = field(default_factory=dict)
    paper: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """Experiments, and where their runs and results go.

    Attributes:
        runs: folder of the runs, STUDY/EXPERIMENT/APPLICATION/ARM-seedN.
        results: the file of rows.
        claims: the file of claims that they are judged by, if any.
        experiments: by name.
        untested: why experiments that claims name are not in the study, by name.
    """

    runs: Path
    results: Path
    claims: Path | None
    experiments: Mapping[str, Experiment]
    untested: Mapping[str, str]

    def planned(self) -> Iterator[tuple[Experiment, str, int]]:
        """Yield experiment, arm and seed of every run, the first seeds of all arms first."""
        for experiment in self.experiments.values():
            for seed in experiment.seeds:
                for arm in experiment.arms:
                    yield experiment, arm, seed

    def folder(self, experiment: Experiment, arm: str, seed: int) -> Path:
        """Return a run's folder."""
        return self.runs / experiment.name / experiment.command.partition(".")[0] / f"{arm}-seed{seed}"

    def clusters_file(self, experiment: Experiment) -> Path:
        """Return the file of the clusters that the experiment finds first."""
        return self.runs / experiment.name / "clusters.json"

    def flags(self, experiment: Experiment, arm: str, seed: int) -> list[str]:
        """Return a run's flags."""
        text = f"{experiment.flags} {experiment.arms[arm]}".replace("{clusters}", str(self.clusters_file(experiment)))
        out, name = str(self.runs / experiment.name), f"{arm}-seed{seed}"
        return [*shlex.split(text), "--threads", str(experiment.threads), "--seed", str(seed), "--out", out,
                "--name", name, "--resume", "auto"]  # fmt: skip

    @property
    def core_hours(self) -> float:
        """Core-hours of all runs, from the minutes that the study states."""
        return sum(each.minutes * each.threads for each, _, _ in self.planned()) / 60


def read_study(path: Path) -> Study:
    """Read a study from its file.

    Raises:
        UsageError: if it cannot be read, lacks something, or holds what it should not.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"study: cannot read {path} ({' '.join(str(error).split())})") from None
    if not isinstance(found, dict) or not isinstance(found.get("experiments"), dict) or not found["experiments"]:
        raise UsageError(f"study: expected runs, results and experiments in {path}")
    for name in found.keys() - {each.name for each in fields(Study)}:
        known = ", ".join(each.name for each in fields(Study))
        raise UsageError(f"study: {name} in {path}: no such entry; expected {known}")
    if not isinstance(untested := found.get("untested", {}), dict):
        raise UsageError(f"study: untested in {path}: expected reasons by experiment, got {untested}")
    for name in ("runs", "results", "claims"):
        if not isinstance(found.get(name, "" if name == "claims" else None), str):
            raise UsageError(f"study: {name} in {path}: expected a path, got {found.get(name)}")
    experiments = {str(name): _experiment(str(name), values) for name, values in found["experiments"].items()}
    claims = Path(found["claims"]) if found.get("claims") else None
    return Study(Path(found["runs"]), Path(found["results"]), claims, experiments, untested)


def _experiment(name: str, values: Any) -> Experiment:
    known = {each.name: each for each in fields(Experiment) if each.name != "name"}
    if not isinstance(values, dict):
        raise UsageError(f"study: experiments.{name}: expected a mapping of {', '.join(known)}, got {values}")
    for given in values:
        if given not in known:
            raise UsageError(f"study: experiments.{name}.{given}: no such entry; expected {', '.join(known)}")
    for needed in known.values():
        if needed.default is MISSING and needed.default_factory is MISSING and needed.name not in values:
            raise UsageError(f"study: experiments.{name} has no {needed.name}")
    for entry in ("arms", "show", "paper"):
        if not isinstance(values.get(entry, {}), dict):
            raise UsageError(f"study: experiments.{name}.{entry}: expected a mapping, got {values[entry]}")
    for entry in ("flags", "command", "title", "clusters", "evaluate"):
        if not isinstance(values.get(entry), str | None):
            raise UsageError(f"study: experiments.{name}.{entry}: expected text, got {values[entry]}")
    for entry in ("threads", "memory", "minutes"):
        if not isinstance(number := values.get(entry, 1), int | float) or number <= 0:
            raise UsageError(f"study: experiments.{name}.{entry}: expected a number above 0, got {number}")
    seeds = values["seeds"]
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise UsageError(f"study: experiments.{name}.seeds: expected a list of whole numbers from 0 on, got {seeds}")
    arms = {str(arm): "" if flags is None else str(flags) for arm, flags in values["arms"].items()}
    notes = tuple(map(str, values.get("notes", ())))
    return Experiment(**{**values, "name": name, "seeds": tuple(seeds), "arms": arms, "notes": notes})
