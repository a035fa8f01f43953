"""The wheels of the suite and of the layers alone, each installed with what it requires, need nothing else."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from sources import ROOT, sources

import common

PACKAGES = ("common", "cbgan", "cbda", "cbcls")
BUILD = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"


def build(source: Path, out: Path) -> Path:
    command = [sys.executable, "-c", BUILD, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def wheels(tmp_path_factory) -> dict[str, Path]:
    """Build the layers' wheel and then the suite's from one tree, where the first leaves its build folder."""
    source = tmp_path_factory.mktemp("source")
    for name in (*PACKAGES, "configs"):
        ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    layers = build(source / "common" / "norms", tmp_path_factory.mktemp("wheel"))
    assert (source / "common" / "norms" / "build" / "lib" / "cbnorm").is_dir()
    return {"cbnorm": layers, "suite": build(source, tmp_path_factory.mktemp("wheel"))}


def metadata(folder: Path) -> Distribution:
    """Return that of the wheel which was unpacked into a folder."""
    (own,) = (path for name in ("cbnorm", "cluster_based_norm") for path in folder.glob(f"{name}-*.dist-info"))
    return Distribution.at(own)


def required(by: Distribution, extras: set[str]) -> list[Requirement]:
    found = map(Requirement, by.requires or ())
    return [r for r in found if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in ("", *extras))]


def install(wheel: Path, folder: Path) -> None:
    """Unpack a wheel of Python alone, and link what it requires, and that requires, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    queue, seen = required(metadata(folder), set()), set()
    while queue:
        requirement = queue.pop()
        if (key := (requirement.name, *sorted(requirement.extras))) in seen:
            continue
        seen.add(key)
        found = distribution(requirement.name)
        assert requirement.specifier.contains(found.version, prereleases=True)
        queue += required(found, requirement.extras)
        for name in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (folder / name).exists():
                (folder / name).symlink_to(str(found.locate_file(name)))


@pytest.fixture(scope="session")
def installed(wheels, tmp_path_factory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in wheels}
    for name, folder in folders.items():
        install(wheels[name], folder)
    return folders


@pytest.fixture(params=["an empty folder", "one with a common of its own"])
def place(request, tmp_path) -> Path:
    if request.param != "an empty folder":
        for name in ("common", "common/norms"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text("mine = True")
    return tmp_path


def run(folder: Path, cwd: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run a Python that finds the standard library, a folder and the working directory, but none of its packages."""
    env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-S", *argv], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_each_holds_its_modules_and_data_and_nothing_else(wheels):
    layers = [*sources("common/norms"), *sources("common/norms", "*.cpp")]
    layers += [ROOT / "common/norms/VERSION", ROOT / "common/norms/py.typed"]
    suite = {*layers, *(path for name in PACKAGES for path in (*sources(name), ROOT / name / "py.typed"))}
    suite |= set(sources("common", "*.j2"))
    configs = {f"{path.parent.name}/configs/{path.name}" for path in (ROOT / "configs").glob("*/*.yaml")}
    assert names(wheels["cbnorm"]) == {f"cbnorm/{path.relative_to(ROOT / 'common/norms')}" for path in layers}
    assert names(wheels["suite"]) == {str(path.relative_to(ROOT)) for path in suite} | configs
    assert wheels["cbnorm"].name == f"cbnorm-{common.__version__}-py3-none-any.whl"
    assert wheels["suite"].name == f"cluster_based_norm-{common.__version__}-py3-none-any.whl"


def test_the_layers_require_torch_and_numpy_alone(installed):
    layers, suite = (set(metadata(folder).requires or ()) for folder in installed.values())
    assert {Requirement(line).name for line in layers} == {"torch", "numpy"}
    assert layers <= suite  # with the same bounds
    assert "Apache License" in (metadata(installed["cbnorm"]).read_text("licenses/LICENSE") or "")


USE = """
import importlib.util, sys
import torch
from torch import nn
import cbnorm

x, ids = torch.randn(8, 4, 6, 6, requires_grad=True), torch.arange(8) % 3
for kind in ("bn", "in", "dsbn", "mn", "scb", "scb_base", "ucb"):
    layer = cbnorm.make_norm(kind, 4, 3)
    y = layer(x, ids) if kind in ("dsbn", "scb", "scb_base") else layer(x)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))
model = cbnorm.convert_norms(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), "ucb")
assert cbnorm.recalibrate(model, [x.detach()]) == cbnorm.converted(model) == ["1"]
with cbnorm.collect_health(model) as found:
    model(x)
assert list(found) == ["1"]
for name in ("timm", "torchvision", "sklearn", "matplotlib", "jsonargparse", "safetensors"):
    assert importlib.util.find_spec(name) is None, name
print(cbnorm.__file__, cbnorm.__version__, "common" in sys.modules)
"""


def test_the_layers_train_convert_and_measure_from_any_folder(installed, place):
    done = run(installed["cbnorm"], place, "-c", USE)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [str(installed["cbnorm"] / "cbnorm" / "__init__.py"), common.__version__, "False"]


def test_the_layers_have_commands(installed, tmp_path):
    refused = run(installed["cbnorm"], tmp_path, "-m", "cbnorm.doctor", "--device", "tpu")
    line = "error: device: expected auto, cpu, cuda or cuda:n, got tpu\n"
    assert (refused.returncode, refused.stdout, refused.stderr) == (2, "", line)


def test_the_suites_commands_and_configurations_by_name(installed, tmp_path):
    dry = run(installed["suite"], tmp_path, "-m", "cbgan.train", "--config", "smoke", "--dry_run")
    assert dry.returncode == 0, dry.stderr
    assert "Generator: " in dry.stdout
    shown = run(installed["suite"], tmp_path, "-m", "cbgan.train", "--config", "smoke", "--print_config").stdout
    assert "epochs: 2\n" in shown
    assert list(tmp_path.iterdir()) == []


def test_the_suite_is_found_from_any_folder(installed, place):
    listed = run(installed["suite"], place, "-m", "cbgan")
    other = place / "common" / "__init__.py"
    if other.exists():
        line = f"error: common: cbgan needs {installed['suite'] / 'common'}, but import common finds {other}; "
        assert (listed.returncode, listed.stderr) == (2, f"{line}rename that, or start elsewhere\n")
        listed = run(installed["suite"], place, "-P", "-m", "cbgan")  # without the working directory
    assert listed.returncode == 0, listed.stderr
    assert "python -m cbgan.train" in listed.stdout
    show = "import common, cbgan; print(common.__file__, cbgan.__version__)"
    shown = run(installed["suite"], place, "-P", "-c", show)
    assert shown.stdout.split() == [str(installed["suite"] / "common" / "__init__.py"), common.__version__]
