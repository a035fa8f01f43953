"""The commands that the documentation shows are commands that exist, with options that exist."""

import importlib.util
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

from cbcls.clusters import FindClustersConfig
from cbcls.config import ClassifierConfig
from cbcls.evaluate import EvaluateConfig as ClassifierEvaluateConfig
from cbcls.figures import FiguresConfig as ClassifierFiguresConfig
from cbcls.predict import PredictConfig as ClassifierPredictConfig
from cbda.config import AdaMatchConfig
from cbda.evaluate import EvaluateConfig as AdaptationEvaluateConfig
from cbda.predict import PredictConfig
from cbda.show import ViewsConfig
from cbgan.bench import BenchConfig as GanBenchConfig
from cbgan.config import GanConfig
from cbgan.evaluate import EvaluateConfig
from cbgan.sample import SampleConfig
from common.data.__main__ import InspectConfig
from common.figures import FiguresConfig
from common.norms.bench import BenchConfig
from common.norms.doctor import DoctorConfig
from common.report import ReportConfig
from common.runtime.cli import parse
from common.tables import TablesConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGURATIONS = {
    "cbcls.clusters": FindClustersConfig,
    "cbcls.evaluate": ClassifierEvaluateConfig,
    "cbcls.predict": ClassifierPredictConfig,
    "cbcls.figures": ClassifierFiguresConfig,
    "cbcls.train": ClassifierConfig,
    "cbda.adamatch": AdaMatchConfig,
    "cbda.evaluate": AdaptationEvaluateConfig,
    "cbda.predict": PredictConfig,
    "cbda.show": ViewsConfig,
    "cbgan.train": GanConfig,
    "cbgan.bench": GanBenchConfig,
    "cbgan.evaluate": EvaluateConfig,
    "cbgan.sample": SampleConfig,
    "common.data": InspectConfig,
    "common.figures": FiguresConfig,
    "common.norms.bench": BenchConfig,
    "common.norms.doctor": DoctorConfig,
    "common.report": ReportConfig,
    "common.tables": TablesConfig,
}


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("python -m ")]


FOLDERS = r"(?:common|cbgan|cbda|cbcls|configs|docs|tests)"


def named(page: Path) -> set[str]:
    """Return the files, folders and Python names of this project that a page names in code type or links to."""
    text = page.read_text(encoding="utf-8")
    paths = re.findall(rf"`({FOLDERS}/[\w./*-]+)`", text)
    names = re.findall(r"`((?:common|cbgan|cbda|cbcls)(?:\.\w+)+)[`(]", text)
    links = re.findall(r"\]\((?!\w+:|#)([^)#]+)", text)
    return {*paths, *names, *(f"./{link}" for link in links)}


def exists(name: str, page: Path) -> bool:
    if name.startswith("./"):
        return (page.parent / name).exists()
    if "/" in name:
        return any(ROOT.glob(name))
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def check(line: str) -> None:
    """Read a command's settings as the command would."""
    _, _, module, *flags = shlex.split(line, comments=True)
    assert importlib.util.find_spec(module), f"there is no module {module}"
    if module not in CONFIGURATIONS:
        return
    own = [str(i) for i, flag in enumerate(flags) if flag.startswith("runs/")]  # a file of the reader's own run
    if "--config" in flags and str(flags.index("--config") + 1) in own:
        del flags[flags.index("--config") : flags.index("--config") + 2]
    if {"--help", "--print_config"} & set(flags):
        with pytest.raises(SystemExit, match="0"):
            parse(CONFIGURATIONS[module], flags)
    else:
        parse(CONFIGURATIONS[module], flags)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_what_a_page_names_is_there_and_its_commands_parse(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert [name for name in sorted(named(page)) if not exists(name, page)] == []
    for line in commands(page):
        check(line)


def test_names_that_are_not_there_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("`common/nowhere.py` `common.norms.nothing(x)` `common.nowhere` [x](gone.md#part) [y](https://z)")
    names = {"common/nowhere.py", "common.norms.nothing", "common.nowhere", "./gone.md"}
    assert named(page) == names
    assert not any(exists(name, page) for name in names)


def test_there_are_commands_to_check_and_wrong_ones_are_found(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {"README.md", "getting-started.md", "configuration.md", "results.md"}
    assert names <= {page.name for page in PAGES if commands(page)}
    for wrong in ("cbgan.trian", "cbgan.train --epohcs 3", "common.figures --config nowhere.yaml"):
        with pytest.raises(Exception, match=r"cbgan\.trian|--epochs|nowhere"):
            check(f"python -m {wrong}  # a remark")
