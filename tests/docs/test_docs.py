"""What the documentation shows works as printed: a page is a test.

Python blocks run (those marked `py` are parsed). Commands run in the page's order, on less; those that ask for a GPU, a
download or long are parsed. A run that another page trained is trained here.
"""

import ast
import glob
import importlib
import importlib.util
import itertools
import pkgutil
import re
import shlex
import subprocess
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cbnorm.registry
import numpy as np
import pytest
import torch
from claims import CLAIMS
from PIL import Image

from common.data.config import DATA_SETS
from common.metrics.scores import METRICS
from common.norms import registry
from common.runtime import cli
from common.runtime.errors import UsageError

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_HERE = re.compile(
    r"cuda|inception|dinov2|cifar|oxford|cbgan/ucb\.yaml|norms?\.(?:bench|doctor)|study\.yaml|NAME|FILE|\*"
)
"""A GPU, downloads, what takes long, a reader's own files and runs."""
TRAINED_BY = {"cbgan": "cbgan.train", "cbcls": "cbcls.train", "cbda": "cbda.adamatch"}
LESS = {
    "cbgan.train": "--cache cache --width 8 --latent_dim 16 --data.size 8 --steps_per_epoch 2 --epochs 2 "
    "--log_every 1 --fid.samples 60 --fid.final_samples 60 --recalibrate.images 64",
    "cbcls.train": "--data.size 8 --steps_per_epoch 1 --batch_size 32 --evaluate_every 10 --checkpoint_every 20 "
    "--recalibrate.images 64",
    "cbda.adamatch": "--data.size 8 --steps_per_epoch 2 --epochs 1 --evaluate_every 1 --recalibrate.images 64",
    "cbcls.clusters": "--data.size 8",
    "cbcls.figures": "--images 50",
    "cbgan.sample": "--count 16",
}
LANGUAGES = {"sh", "python", "py", "json", "yaml", "text", "mermaid"}
SHELL = """
python() { printf '%q ' "$@"; echo; }
srun() { "$@"; }
make() { if [ "$1" = train ]; then python -m cbgan.train; fi; }
"""
"""All the programs that a page's blocks find; bash itself resolves variables, loops and continued lines."""


def blocks(page: Path, language: str) -> list[str]:
    """Return a page's blocks in a language, each after as many empty lines as there are lines before it."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text[: block.start(1)].count("\n") + block[1] for block in found]


def commands(page: Path) -> list[str]:
    """Return what a page starts by ``python -m``."""
    script = "\n".join([SHELL, *blocks(page, "sh")])
    argv = ["/bin/bash", "-r", "-c", script]  # -r: writes no files
    done = subprocess.run(argv, env={"PATH": ""}, capture_output=True, text=True, check=False)
    found = [line.removeprefix("-m ") for line in done.stdout.splitlines() if line.startswith("-m ")]
    assert len(found) >= len(re.findall(r"(?<!/)python -m", script)) - SHELL.count("python -m"), done.stderr
    return found


FOLDERS = r"(?:common|cbgan|cbda|cbcls|configs|docs|tests)"


def named(page: Path) -> set[str]:
    """Return the files, folders and Python names of this project that a page names in code type or links to."""
    text = page.read_text(encoding="utf-8")
    paths = re.findall(rf"`({FOLDERS}/[\w./*-]+)`", text)
    names = re.findall(r"`((?:common|cbnorm|cbgan|cbda|cbcls)(?:\.\w+)+)[`(]", text)
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


class Parsed(Exception):
    pass


def start(module: str, flags: Sequence[str], *, parse: bool = False) -> None:
    """Run a command, or only read its settings."""
    spec = importlib.util.find_spec(module)
    assert spec, f"there is no module {module}"
    if "." not in module:  # lists the commands of a package
        return
    main = importlib.import_module(f"{module}.__main__" if spec.submodule_search_locations else module).main
    build, parse_args = cli._build, ArgumentParser.parse_args

    def stop_once_built(cls: type, values: Any, prefix: str = "") -> Any:
        built = build(cls, values, prefix)
        if not prefix:
            raise Parsed
        return built

    def stop_once_parsed(self: ArgumentParser, argv: Sequence[str]) -> None:
        parse_args(self, argv)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        if parse:
            patch.setattr(cli, "_build", stop_once_built)
            patch.setattr(ArgumentParser, "parse_args", stop_once_parsed)
        try:
            main(flags)
        except Parsed:
            pass
        except SystemExit as ended:  # after --help and --print_config
            if ended.code:
                raise


def follow(line: str) -> None:
    """Run a command of a page on less, and see that it leaves what it was told to."""
    module, *flags = shlex.split(line)
    if NOT_HERE.search(line):
        start(module, flags, parse=True)
        return
    for application, name in re.findall(r"runs/(\w+)/([\w-]+)", line):
        if not Path("runs", application, name).exists():
            own = {"--name": name, "--checkpoint_keep": "10"}
            own["--norm.kind"] = "bn" if "bn" in name else "ucb"
            own["--seed"] = name[-1] if name[-1].isdigit() else "0"
            train(TRAINED_BY[application], *itertools.chain(*own.items()))
    if module in TRAINED_BY.values():
        train(module, *flags)
    else:
        start(module, [*flags, *LESS.get(module, "").split()])
    for option, value in itertools.pairwise(flags):
        if option in ("--out", "--grid", "--export") and module not in TRAINED_BY.values():
            assert glob.glob(f"{value}*"), f"{line} left no {value}"


def train(module: str, *flags: str) -> None:
    """Train a run that has a name or all defaults; of another only try the settings."""
    less = [] if "--resume" in flags and "auto" not in flags else LESS[module].split()
    start(module, [*flags, *less, *(["--dry_run"] if flags and "--name" not in flags else [])])


@pytest.fixture
def folder(tmp_path, monkeypatch) -> None:
    """Go to a folder with the configurations and a reader's images, with and without classes."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "PATH").symlink_to("photos")
    draw = np.random.default_rng(0)
    pets = [f"pets/{split}/{breed}" for split in ("train", "test") for breed in ("tabby", "siamese", "poodle")]
    for name in ("photos/cats", "photos/dogs", "unsorted", *pets):
        (tmp_path / name).mkdir(parents=True)
        for number in range(40):
            pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    for norms in (registry, cbnorm.registry):  # a page shows how to add to these
        monkeypatch.setattr(norms, "_KINDS", dict(norms._KINDS))
    monkeypatch.setattr(DATA_SETS, "_known", dict(DATA_SETS._known))
    monkeypatch.setattr(METRICS, "_known", dict(METRICS._known))


# What the page of the layers says of it, where it converts a ViT.
@pytest.mark.filterwarnings("ignore:blocks.0.norm1 and 24 more. a LayerNorm keeps no statistics:UserWarning")
@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).with_suffix("").as_posix())
def test_a_page_works_as_printed(page):
    assert [name for name in sorted(named(page)) if not exists(name, page)] == []
    assert set(re.findall(r"^```(.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)) <= LANGUAGES
    for code in blocks(page, "py"):
        ast.parse(code)
    for text in blocks(page, "json"):
        Path("superclasses.json").write_text(text)
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        for code in blocks(page, "python"):
            if code.lstrip().startswith("import "):  # a block that stands alone
                names = {"__name__": f"docs.{page.stem}"}
            exec(compile(code, str(page), "exec"), names)
        CLAIMS.get(page.stem, lambda names: None)(names)
    for line in commands(page):
        follow(line)


def test_what_is_not_there_is_found(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("`common/nowhere.py` `common.norms.nothing(x)` `common.nowhere` [x](gone.md#part) [y](https://z)")
    names = {"common/nowhere.py", "common.norms.nothing", "common.nowhere", "./gone.md"}
    assert named(page) == names
    assert not any(exists(name, page) for name in names)
    monkeypatch.chdir(tmp_path)
    page.write_text("".join(f"```sh\npython -m {line}\n```\n" for line in WRONG))
    assert len(commands(page)) == len(WRONG)
    for line, parse in itertools.product(commands(page), (False, True)):
        module, *flags = shlex.split(line)
        with pytest.raises((AssertionError, UsageError), match=r"cbgan\.trian|--epochs|nowhere"):
            start(module, flags, parse=parse)


WRONG = ("cbgan.trian", "cbgan.train --epohcs 3", "common.figures --config nowhere.yaml")
