"""``python -m cbgan``: its commands by name; and its own configurations by name."""

import subprocess
import sys
from pathlib import Path

import pytest
from sources import sources

import cbgan
import common
from cbgan.config import GanConfig
from common import norms
from common.runtime import command
from common.runtime.cli import configurations, parse
from common.runtime.errors import UsageError

ROOT = Path(__file__).parents[2]


def test_every_module_that_starts_a_command_is_listed():
    for package in ("cbgan", "cbcls", "cbda", "common"):
        starting = set()
        for path in sources(package):
            if "\n    run_command(main)\n" in path.read_text():
                starting.add(".".join(path.relative_to(ROOT / package).with_suffix("").parts).removesuffix(".__main__"))
        found = command.commands(package)
        assert set(found) == starting
        assert all(found.values())


def run(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], cwd=cwd, capture_output=True, text=True, check=False)


def test_a_package_lists_its_commands_starts_one_and_refuses_others(tmp_path):
    listed = run("-m", "cbgan", cwd=tmp_path)
    assert (listed.returncode, listed.stderr) == (0, "")
    names = [f"cbgan.{name}" for name in ("bench", "compare", "evaluate", "sample", "train")]
    assert [line.split()[2] for line in listed.stdout.splitlines()[:-1]] == names
    started = run("-m", "cbgan", "train", "--epohcs", "3", cwd=tmp_path)
    assert (started.returncode, started.stderr) == (2, "error: --epohcs: no such option; did you mean --epochs?\n")
    unknown = run("-m", "cbgan", "trian", cwd=tmp_path)
    there = "bench, compare, evaluate, sample, train"
    line = f"trian: no such command of python -m cbgan; there are {there}; did you mean python -m cbgan.train?"
    assert (unknown.returncode, unknown.stderr) == (2, f"error: {line}\n")


def test_every_configuration_is_found_by_name():
    for folder in (ROOT / "configs").iterdir():
        assert configurations(folder.name) == {
            path.stem: ROOT / folder.name / "configs" / path.name for path in sorted(folder.glob("*.yaml"))
        }, f"{folder.name}/configs has to be a link to ../configs/{folder.name}"


def test_an_applications_own_configuration_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--config", "smoke"]
    expected = parse(GanConfig, ["--config", str(ROOT / "configs" / "cbgan" / "smoke.yaml")])
    assert parse(GanConfig, flags) == parse(GanConfig, ["--config=smoke"]) == expected
    (tmp_path / "smoke").mkdir()  # no file
    assert parse(GanConfig, flags) == expected
    (tmp_path / "smoke").rmdir()
    (tmp_path / "smoke").write_text("epochs: 9\n")  # the user's own file goes first
    assert parse(GanConfig, flags).epochs == 9


def test_a_wrong_name_lists_those_that_there_are():
    names = "conditional, paper_bn, paper_mn, paper_ucb, smoke, ucb"
    for given, hint in {"configs/cbgan/smok.yaml": "; did you mean --config smoke?", "default": ""}.items():
        with pytest.raises(UsageError) as caught:
            parse(GanConfig, ["--config", given])
        assert str(caught.value) == f"config: no file {given}; by name cbgan has {names}{hint}"


@pytest.mark.parametrize(("package", "form"), [("cbgan", "common.py"), ("cbda", "common/__init__.py")])
def test_another_common_in_the_users_folder_is_one_line_and_is_not_run(tmp_path, package, form):
    other = tmp_path / form
    other.parent.mkdir(exist_ok=True)
    other.write_text("print('ran')")
    line = (
        f"common: {package} needs {ROOT / 'common'}, but import common finds {other}; rename that, or start elsewhere"
    )
    started = run("-m", package, cwd=tmp_path)
    assert (started.returncode, started.stdout, started.stderr) == (2, "", f"error: {line}\n")
    imported = run("-c", f"import {package}", cwd=tmp_path)
    assert imported.stderr.splitlines()[-1] == f"ImportError: {line}"
    assert imported.stdout == ""


def test_there_is_one_version():
    assert cbgan.__version__ == common.__version__ == norms.__version__
    assert f"version: {common.__version__}\n" in (ROOT / "CITATION.cff").read_text()
