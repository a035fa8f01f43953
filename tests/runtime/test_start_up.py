"""What a command need not wait for: a mistyped flag is answered without the packages that only a run uses."""

import importlib.util
import subprocess
import sys

import pytest

import common.data
import common.metrics

SLOW = [
    "torchvision", "torch_fidelity", "timm", "albumentations", "sklearn", "scipy", "matplotlib", "tensorboard",
    "torch.utils.tensorboard", "torch._dynamo", "triton", "sympy", "pandas",
]  # fmt: skip

MAIN = """
import sys
from {application}.train import main
from common.runtime.errors import UsageError
try:
    main(["--mistyped", "1"])
except UsageError as error:
    print(error)
print(*sys.modules)
"""


@pytest.mark.parametrize("application", ["cbgan", "cbcls"])
def test_a_mistyped_flag_is_answered_without_what_only_a_run_needs(application):
    command = [sys.executable, "-c", MAIN.format(application=application)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    line, modules = done.stdout.splitlines()
    assert line.startswith("--mistyped: no such option")
    assert not set(SLOW) & set(modules.split())


def test_the_slow_packages_are_named_as_they_are_imported():
    installed = [name for name in SLOW if importlib.util.find_spec(name) is not None]
    assert {"torchvision", "torch_fidelity", "sklearn", "torch.utils.tensorboard", "torch._dynamo"} <= set(installed)


def test_the_public_names_of_data_and_metrics_are_there():
    for package in (common.data, common.metrics):
        assert all(callable(getattr(package, name)) for name in package.__all__)
