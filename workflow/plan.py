"""Check a study's settings before its first run."""

from pathlib import Path

from cbcls.config import ClassifierConfig
from cbda.config import AdaMatchConfig
from cbgan.config import GanConfig
from common.reports.study import Study
from common.runtime.cli import flatten, parse, to_dict
from common.runtime.errors import UsageError

COMMANDS = {"cbgan.train": GanConfig, "cbda.adamatch": AdaMatchConfig, "cbcls.train": ClassifierConfig}


def check(study: Study) -> None:
    """Parse the flags of every arm, and look for the folders of one's own images; published sets are downloaded.

    Raises:
        UsageError: naming the experiment and arm.
    """
    arms = [(experiment, arm) for experiment in study.experiments.values() for arm in experiment.arms]
    for experiment, arm in arms:
        place = f"study: experiments.{experiment.name}.arms.{arm}"
        if experiment.command not in COMMANDS:
            raise UsageError(f"{place}: expected a command of {', '.join(COMMANDS)}, got {experiment.command}")
        try:
            cfg = parse(COMMANDS[experiment.command], study.flags(experiment, arm, experiment.seeds[0]))
        except UsageError as error:
            raise UsageError(f"{place}: {error}") from None
        settings = dict(flatten(to_dict(cfg)))
        for name, value in settings.items():
            group, _, entry = name.rpartition(".")
            own = entry in ("root", "test_root") and settings[f"{group}.name"] == "imagefolder"
            if own and value is not None and not Path(value).exists():
                raise UsageError(f"{place}: {name}: there is no folder {value}")
