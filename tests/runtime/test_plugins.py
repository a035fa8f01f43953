"""Code of the user's own: imported by name before settings are checked, and missed in one line."""

import sys
from pathlib import Path

import pytest
import yaml
from refusals import refused

import cbcls.train
import common.data.__main__
from common.data.config import DATA_SETS
from common.metrics.scores import METRICS
from common.norms import registry
from common.runtime.errors import UsageError
from common.runtime.plugins import GROUP, installed_plugins, load_plugins
from common.train.logging import read_metrics

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
PLUGIN = PAGE.split("```python\n")[1].split("```")[0]
"""What the documentation shows of a plugin."""
SHOWN = next(line for line in PAGE.splitlines() if line.startswith("python -m cbcls.train --plugins"))
FLAGS = ["--norm.kind", "grouped", "--norm.num_components", "4", "--data.name", "stripes"]


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Return a function that brings back what a new process would know."""
    known = {"_KINDS": dict(registry._KINDS), "data": dict(DATA_SETS._known), "metrics": dict(METRICS._known)}

    def act() -> None:
        monkeypatch.setattr(registry, "_KINDS", dict(known["_KINDS"]))
        monkeypatch.setattr(DATA_SETS, "_known", dict(known["data"]))
        monkeypatch.setattr(METRICS, "_known", dict(known["metrics"]))
        for name in [name for name in sys.modules if name.startswith("plugin_of_")]:
            del sys.modules[name]

    act()
    yield act
    act()


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Make a folder of modules."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "plugin_of_tests.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def entry_point(place) -> Path:
    """Install the module as a distribution with an entry point would."""
    info = place / "tests_plugin-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tests-plugin\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nmine = plugin_of_tests\n")
    return info


def flags(tmp_path: Path, *more: str) -> list[str]:
    small = ["--epochs", "1", "--batch_size", "60", "--data.size", "8"]
    return [*small, "--out", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache"), "--name", "run", *more]


RESUME = ["--epochs", "2", "--resume"]


def test_a_run_with_a_plugin_records_it_and_goes_on_with_it(place, tmp_path, forget, capsys):
    cbcls.train.main(flags(tmp_path, *FLAGS, "--plugins", "plugin_of_tests"))
    folder = tmp_path / "runs" / "cbcls" / "run"
    assert 0.5 <= read_metrics(folder)[-1]["metric/confidence"] <= 1  # of two classes
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["plugins"] == ["plugin_of_tests"]
    assert (settings["norm"]["kind"], settings["norm"]["eps"]) == ("grouped", 1e-5)
    resume = ["--out", str(tmp_path / "runs"), "--name", "run", *RESUME]
    forget()
    cbcls.train.main(resume)
    forget()
    (place / "plugin_of_tests.py").unlink()
    line = refused(capsys, cbcls.train.main, *resume)
    assert line.startswith("error: plugins: plugin_of_tests cannot be imported (No module named 'plugin_of_tests');")


def test_an_entry_point_needs_no_flag_is_noted_with_its_version_and_missed_by_name(
    entry_point, tmp_path, forget, capsys
):
    cbcls.train.main(flags(tmp_path, *FLAGS))
    sessions = yaml.safe_load((tmp_path / "runs" / "cbcls" / "run" / "environment.json").read_text())["sessions"]
    assert sessions[-1]["plugins"] == {"tests-plugin": "1.5"} == installed_plugins()
    resume = ["--out", str(tmp_path / "runs"), "--name", "run", *RESUME]
    forget()
    (entry_point / "METADATA").write_text("Metadata-Version: 2.1\nName: tests-plugin\nVersion: 1.6\n")
    capsys.readouterr()
    cbcls.train.main(resume)
    assert "plugins.tests-plugin: the run used 1.5, this process has 1.6" in capsys.readouterr().err
    forget()
    (entry_point / "entry_points.txt").unlink()
    line = refused(capsys, cbcls.train.main, *resume)
    assert line == "error: plugins: the run had tests-plugin 1.6, which is not installed here; install it"


def test_a_broken_entry_point_is_one_line_that_names_its_package(entry_point, place, tmp_path, capsys):
    (place / "plugin_of_tests.py").write_text("import plugin_of_nobody")
    line = refused(capsys, cbcls.train.main, *flags(tmp_path))
    assert "No module named 'plugin_of_nobody'" in line
    assert line.endswith("; entry point mine of tests-plugin; repair or remove that")


def test_no_path_is_imported(place):
    for name in ("modules/plugin_of_tests.py", "./plugin_of_tests", "a b", ".relative", ""):
        with pytest.raises(UsageError, match=r"^plugins: expected modules by name"):
            load_plugins([name])
    assert "plugin_of_tests" not in sys.modules


def test_a_plugin_that_cannot_be_imported_is_one_line(place, tmp_path, capsys):
    texts = {
        "invalid syntax": "def broken(:",
        "cannot import name 'nothing'": "from common.norms import nothing",
        "name: ucb is taken; the kinds are": PLUGIN.replace('"grouped"', '"ucb"'),
    }
    for number, (reason, text) in enumerate(texts.items()):
        (place / f"plugin_of_tests{number}.py").write_text(text)
        line = refused(capsys, cbcls.train.main, *flags(tmp_path, "--plugins", f"plugin_of_tests{number}"))
        assert line.startswith(f"error: plugins: plugin_of_tests{number} cannot be imported ({reason}")
    assert not (tmp_path / "runs").exists()


def test_wrong_flags_are_told_before_anything_is_imported(place, tmp_path, capsys):
    line = refused(capsys, cbcls.train.main, *flags(tmp_path, "--plugins", "plugin_of_tests", "--epohcs", "3"))
    assert "did you mean --epochs" in line
    assert "plugin_of_tests" not in sys.modules


def test_help_and_the_look_at_data_know_a_plugin(place, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit, match="0"):
        cbcls.train.main(["--plugins", "plugin_of_tests", "--help"])
    assert ",none,grouped}" in "".join(capsys.readouterr().out.split())
    monkeypatch.chdir(tmp_path)
    common.data.__main__.main(["--plugins", "plugin_of_tests", "--name", "stripes", "--size", "8"])
    assert "240 images" in capsys.readouterr().out
    assert list(Path().glob("contact-stripes-*.png"))


def test_the_command_that_the_documentation_shows(place, tmp_path, capsys):
    (place / "plugin_of_tests.py").rename(place / "my_lab.py")
    cbcls.train.main([*SHOWN.split()[3:], "--dry_run", "--batch_size", "60", "--data.size", "8"])
    assert "240 train, 240 test" in capsys.readouterr().out
    del sys.modules["my_lab"]


def test_a_module_is_imported_once(place):
    count = "import sys\nsys.plugin_of_counts = getattr(sys, 'plugin_of_counts', 0) + 1"
    (place / "plugin_of_counts.py").write_text(count)
    for _ in range(3):
        load_plugins(["plugin_of_counts"])
    assert vars(sys)["plugin_of_counts"] == 1
