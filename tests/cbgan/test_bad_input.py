"""Bad input is one line that names the field, the value and what would be right; nothing is written."""

import shutil
from pathlib import Path

import pytest
from PIL import Image
from refusals import refused

import cbgan.evaluate
import cbgan.sample
import cbgan.train
from cbgan.config import GanConfig
from cbgan.export import checkpoint_of
from common.norms.backends.cpu import library
from common.runtime.cli import parse


@pytest.fixture
def picture(tmp_path) -> Path:
    """Make a folder of two classes with one image each, and return one of them."""
    for name in ("cats", "dogs"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.effect_noise((40, 40), 50).convert("RGB").save(tmp_path / "images" / name / "one.png")
    return tmp_path / "images" / "dogs" / "one.png"


FLAGS = {
    "--norm.kind foo": ["norm.kind", "foo", "ucb"],
    "--norm.kind scb": ["norm.num_components", "scb", "10 classes", "--norm.num_components 10", "got 3"],
    "--norm.groups 7": ["norm.groups", "7"],
    "--r1 -1": ["r1", "0 or more", "-1"],
    "--r1 1 --precision fp16": ["r1", "expected 0 with precision fp16"],
    "--r1 1 --compile": ["r1", "expected 0 with compile", "1"],
    "--augment color flip": ["augment", "cutout", "flip"],
    "--augment color none": ["augment", "color", "got none"],
    "--loss wasserstein": ["loss", "hinge", "wasserstein"],
    "--recalibrate.batch_size 1": ["recalibrate.batch_size", "at least 2", "1"],
    "--batch_size 2000": ["batch_size", "1000", "2000"],
    "--width 20": ["width", "multiple of 8", "20"],
    "--beta1 1": ["beta1", "1"],
    "--base_size 3": ["base_size", "0 or 1", "3"],
    "--data.validation 0.1": ["data.validation", "expected 0 or null"],
    "--data.name imagefolder": ["data.root"],
    "--data.name imagefolder --data.root x --data.in_memory false": ["data.in_memory", "true", "FID"],
    "--fid.samples 1": ["fid.samples", "1"],
    "--fid.extractor inception --fid.weights nowhere.pth": ["fid.weights", "nowhere.pth"],
    "--name x --init_from nowhere.pt": ["init_from", "nowhere.pt"],
}
"""Of this application; what all runs refuse is tested in tests/train, tests/data and tests/norms."""


def test_bad_flags_are_one_line_each_and_nothing_is_written(tiny, tmp_path, capsys):
    for flags, parts in FLAGS.items():
        line = refused(capsys, cbgan.train.main, *tiny, *flags.split())
        assert all(part in line for part in parts), line
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_picture_is_named(tiny, tmp_path, capsys, picture):
    picture.write_bytes(picture.read_bytes()[:300])
    folder = ["--data.name", "imagefolder", "--data.root", str(tmp_path / "images")]
    assert str(picture) in refused(capsys, cbgan.train.main, *tiny, *folder)
    assert not (tmp_path / "cbgan").exists()


def test_unlabelled_pictures_have_no_classifier(tiny, tmp_path, capsys, picture):
    folder = ["--data.name", "imagefolder", "--data.root", str(picture.parent), "--batch_size", "2"]
    Image.effect_noise((32, 32), 50).save(picture.parent / "two.png")
    line = refused(capsys, cbgan.train.main, *tiny, *folder)
    assert "fid.extractor" in line
    assert "inception" in line
    line = refused(capsys, cbgan.train.main, *tiny, *folder, "--norm.kind", "scb", "--evaluate_every", "0")
    assert "the images of imagefolder have no labels; expected a norm.kind without clusters" in line
    assert not (tmp_path / "cbgan").exists()


@pytest.fixture
def run(unmeasured, tmp_path) -> list[str]:
    """Copy a run of an epoch, and return the flags that resume it."""
    shutil.copytree(unmeasured, tmp_path, dirs_exist_ok=True)
    return ["--out", str(tmp_path), "--name", "run", "--resume"]


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.skipif(library.library(3) is None, reason="needs a C++ compiler on the PATH")
def test_a_run_that_began_with_a_compiler_where_there_is_none(run, tmp_path, capsys, monkeypatch):
    before = listing(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    line = refused(capsys, cbgan.train.main, *run)
    assert line.startswith("error: backend: the run's layers were computed by compiled, here they would be by eager; ")
    assert listing(tmp_path) == before


def test_evaluating_what_is_not_a_run(run, tmp_path, capsys):
    assert "run: give the run's folder" in refused(capsys, cbgan.evaluate.main)
    assert "config.yaml" in refused(capsys, cbgan.evaluate.main, "--run", str(tmp_path))
    folder = str(tmp_path / "cbgan" / "run")
    assert "samples" in refused(capsys, cbgan.evaluate.main, "--run", folder, "--samples", "1")
    line = refused(capsys, cbgan.evaluate.main, "--run", folder, "--check")
    assert line == f"error: check: {folder} logged no metric/fid_classifier of 60 samples to compare with; leave it out"
    (tmp_path / "mine.png").write_text("mine")
    line = refused(capsys, cbgan.evaluate.main, "--run", folder, "--grid", str(tmp_path / "mine.png"))
    assert "mine.png exists; add --force" in line
    assert (tmp_path / "mine.png").read_text() == "mine"


def test_evaluating_and_sampling_what_does_not_fit(run, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "cbgan" / "run"
    before = listing(folder)
    measure = ("--run", str(folder))
    line = refused(capsys, cbgan.evaluate.main, *measure, "--data.size", "16")
    assert line == "error: data.size: the run makes images of 8 pixels, expected 8, got 16"
    assert "images: expected null with a run" in refused(capsys, cbgan.evaluate.main, *measure, "--images", "some")
    line = refused(capsys, cbgan.evaluate.main, *measure, "--checkpoint", "nine")
    assert line.startswith("error: checkpoint: expected last, best or the number of a kept epoch")
    file = max((folder / "checkpoints").glob("step-*.pt"))
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    other = tmp_path / "other" / "checkpoints" / file.name
    other.write_bytes(file.read_bytes())
    line = refused(capsys, cbgan.evaluate.main, *measure, "--checkpoint", str(other))
    assert line == f"error: checkpoint: expected one of {folder}, got {other}; leave --run out"
    drawn = tmp_path / "drawn.png"
    cbgan.sample.main([*measure, "--checkpoint", str(file), "--count", "2", "--out", str(drawn)])
    assert drawn.is_file()
    drawn.unlink()
    monkeypatch.setenv("HOME", str(tmp_path))
    cbgan.sample.main(["--checkpoint", f"~/cbgan/run/checkpoints/{file.name}", "--count", "2", "--out", str(drawn)])
    assert drawn.is_file()
    drawn.unlink()
    capsys.readouterr()
    line = "error: checkpoint: expected a path, got ~nobody_9/last.pt, and there is no such user"
    for command in (cbgan.sample.main, cbgan.evaluate.main):
        assert refused(capsys, command, "--checkpoint", "~nobody_9/last.pt") == line
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("last", "best", "10"):  # files of such names in the folder where a command happens to run
        Path(name).touch()
        assert checkpoint_of(folder, name) == (folder, name)
    (tmp_path / "other" / "config.yaml").write_text((folder / "config.yaml").read_text() + "\nwidth: 16\n")
    line = refused(capsys, cbgan.evaluate.main, "--checkpoint", str(other))
    assert line.startswith(f"error: run: the weights in {other.parents[1]} are not of its config.yaml (")
    assert listing(folder) == before


def test_a_folder_to_evaluate_that_cannot_be(tmp_path, capsys, picture):
    def line(*flags: str) -> str:
        return refused(capsys, cbgan.evaluate.main, *flags, "--out", str(tmp_path / "out"))

    assert line("--images", str(picture.parent)).startswith(
        "error: data.name: say which real images to measure against"
    )
    digits = ("--data.name", "digits")
    assert line("--images", str(picture.parent), *digits) == (
        f"error: images: {picture.parent} has 1, expected at least 2"
    )
    images = str(picture.parents[1])
    assert line("--images", images, *digits, "--samples", "3") == (
        f"error: samples: {images} has 2, expected at least 3, or fewer samples"
    )
    assert line("--images", "nowhere", *digits) == "error: images: no folder nowhere"
    assert "check: expected false with --images" in line("--images", images, *digits, "--check")
    on_disk = ("--data.name", "imagefolder", "--data.root", "x", "--data.in_memory", "false")
    assert line("--images", images, *on_disk).startswith("error: data.in_memory: expected true")
    assert not (tmp_path / "out").exists()


def test_channels_of_the_layers_under_test_are_what_groups_have_to_divide(capsys):
    """A generator of width 24 has norms of 12 and of 6 channels."""
    flags = ["--width", "24", "--norm.kind", "ucb", "--norm.groups"]
    assert parse(GanConfig, [*flags, "6"]).norm.groups == 6
    assert "norm.groups: expected" in refused(capsys, cbgan.train.main, *flags, "4", "--dry_run")
