"""A wheel, built and installed into a folder, does without the checkout: commands, configurations."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import common

ROOT = Path(__file__).parents[2]
PACKAGES = ("common", "cbgan", "cbda", "cbcls")
FORGET_CHECKOUT = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
"""
"""An editable installation finds the checkout whatever the path says."""


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*PACKAGES, "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(out)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> dict[str, str]:
    """Install the wheel into a folder and return an environment that finds it, and no checkout."""
    folder, site = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)  # which is all that an installer does with a wheel of Python alone
    (site / "sitecustomize.py").write_text(FORGET_CHECKOUT)
    return os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{site}", "OMP_NUM_THREADS": "1"}


def run(installed: dict[str, str], cwd: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], cwd=cwd, env=installed, capture_output=True, text=True, check=False)


def test_it_holds_every_module_and_configuration_and_nothing_else(wheel):
    expected = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    expected |= {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.cpp")}
    expected |= {f"{name}/py.typed" for name in PACKAGES}
    expected |= {f"{path.parent.name}/configs/{path.name}" for path in (ROOT / "configs").glob("*/*.yaml")}
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert files == expected
    assert wheel.name.startswith(f"cluster_based_norm-{common.__version__}-")


def test_commands_and_configurations_by_name_from_any_folder(installed, tmp_path):
    found = run(installed, tmp_path, "-c", "import common, cbgan; print(common.__file__, cbgan.__version__)")
    place, version = found.stdout.split()
    assert ROOT not in Path(place).parents
    assert version == common.__version__
    assert "python -m cbgan.train" in run(installed, tmp_path, "-m", "cbgan").stdout
    assert "epochs: 2\n" in run(installed, tmp_path, "-m", "cbgan.train", "--config", "smoke", "--print_config").stdout
    assert list(tmp_path.iterdir()) == []
