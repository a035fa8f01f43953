"""Bad input is one line that names the field, the value and what would be right; nothing is written."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from refusals import refused

import cbcls.train
import cbgan.evaluate
import cbgan.train


@pytest.fixture
def picture(tmp_path) -> Path:
    """Make a folder of two classes with one image each, and return one of them."""
    for name in ("cats", "dogs"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.effect_noise((40, 40), 50).convert("RGB").save(tmp_path / "images" / name / "one.png")
    return tmp_path / "images" / "dogs" / "one.png"


FLAGS = {
    "--norm.kind foo": ["norm.kind", "foo", "ucb"],
    "--norm.kind scb": ["norm.kind", "scb", "cluster id"],
    "--norm.num_components 0": ["norm.num_components", "at least 1", "0"],
    "--norm.groups 7": ["norm.groups", "7"],
    "--norm.kind bn --norm.update weight": ["norm.update", "weight", "bn"],
    "--norm.statistics learned": ["norm.statistics", "learned"],
    "--norm.init identity": ["norm.init", "identity"],
    "--norm.momentum 2": ["norm.momentum", "0 to 1", "2"],
    "--epochs -1": ["epochs", "at least 1", "-1"],
    "--epochs many": ["epochs", "whole number", "many"],
    "--batch_size 1": ["batch_size", "at least 2", "1"],
    "--batch_size 2000": ["batch_size", "1000", "2000"],
    "--width 20": ["width", "multiple of 8", "20"],
    "--lr 0": ["lr", "more than 0"],
    "--beta1 1": ["beta1", "1"],
    "--base_size 3": ["base_size", "4", "3"],
    "--data.size 33": ["data.size", "33"],
    "--data.name mnist9": ["data.name", "mnist9", "digits"],
    "--data.name imagefolder": ["data.root"],
    "--data.name imagefolder --data.root nowhere": ["data.root", "nowhere"],
    "--data.workers -1": ["data.workers", "-1"],
    "--data.name cifar100 --data.root nowhere --data.download false": ["data.root", "nowhere"],
    "--fid.every -1": ["fid.every", "-1"],
    "--fid.samples 1": ["fid.samples", "1"],
    "--fid.extractor vgg": ["fid.extractor", "vgg", "inception"],
    "--fid.extractor inception --fid.weights nowhere.pth": ["fid.weights", "nowhere.pth"],
    "--fid.weights_sha256 abc": ["fid.weights_sha256", "abc"],
    "--device tpu": ["device", "tpu", "cuda"],
    "--precision fp8": ["precision", "fp8", "bf16"],
    "--log_every 0": ["log_every", "at least 1", "0"],
    "--seed -1": ["seed", "0 or more", "-1"],
    "--name a/b": ["name", "a/b"],
    "--resume": ["resume", "--name"],
    "--name ghost --resume": ["name", "ghost", "no runs"],
    "--name x --init_from nowhere.pt": ["init_from", "nowhere.pt"],
    "--nmae x": ["--nmae", "--name"],
    "--config nowhere.yaml": ["config", "nowhere.yaml"],
    "--data.in_memory false": ["data.in_memory", "true", "FID"],
}


@pytest.mark.parametrize("flags", FLAGS)
def test_bad_flags(tiny, tmp_path, capsys, flags):
    line = refused(capsys, cbgan.train.main, *tiny, *flags.split())
    for part in FLAGS[flags]:
        assert part in line, line
    assert list(tmp_path.iterdir()) == []


FILES = {
    "epochs: [1": ["bad.yaml"],
    "epochs: ten": ["epochs", "whole number", "ten"],
    "norm: ucb": ["norm", "ucb"],
    "norm: {kinds: ucb}": ["norm.kinds", "norm.kind"],
}


@pytest.mark.parametrize("text", FILES)
def test_bad_yaml(tiny, tmp_path, capsys, text):
    (tmp_path / "bad.yaml").write_text(text)
    line = refused(capsys, cbgan.train.main, *tiny, "--config", str(tmp_path / "bad.yaml"))
    for part in FILES[text]:
        assert part in line, line
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


def test_a_cuda_device_that_is_not_there(tiny, capsys):
    missing = f"cuda:{torch.cuda.device_count()}"
    assert f"{missing} asked for" in refused(capsys, cbgan.train.main, *tiny, "--device", missing)


def test_a_file_where_the_folder_should_be(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    folder = ["--data.name", "imagefolder", "--data.root", str(tmp_path / "file")]
    assert f"{tmp_path / 'file'}" in refused(capsys, cbgan.train.main, *tiny, *folder)
    assert "out: cannot write" in refused(capsys, cbgan.train.main, *tiny, "--out", str(tmp_path / "file"))


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
    assert not (tmp_path / "cbgan").exists()


def test_a_weights_file_of_another_network(tiny, tmp_path, capsys):
    torch.save({"weight": torch.ones(3)}, tmp_path / "weights.pth")
    flags = ["--fid.extractor", "inception", "--fid.weights", str(tmp_path / "weights.pth")]
    line = refused(capsys, cbgan.train.main, *tiny, *flags)
    assert "fid.weights" in line
    assert "SHA-256" in line


@pytest.fixture
def run(tiny, tmp_path, capsys) -> list[str]:
    """Train one epoch under the name run, and return the flags that resume it."""
    cbgan.train.main([*tiny, "--epochs", "1", "--fid.every", "0", "--name", "run"])
    capsys.readouterr()
    return ["--out", str(tmp_path), "--name", "run", "--resume"]


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_configuration_file_that_was_broken_since(run, tmp_path, capsys):
    (tmp_path / "cbgan" / "run" / "config.yaml").write_text("epochs: [")
    assert "config.yaml" in refused(capsys, cbgan.train.main, *run)


def test_initial_weights_of_other_shapes_or_none(run, tiny, tmp_path, capsys):
    source = tmp_path / "cbgan" / "run" / "checkpoints" / "step-00000008.pt"
    line = refused(capsys, cbgan.train.main, *tiny, "--name", "wide", "--width", "16", "--init_from", str(source))
    assert "init_from" in line
    assert "does not fit" in line
    os.truncate(source, 1000)
    assert "init_from" in refused(capsys, cbgan.train.main, *tiny, "--name", "wide", "--init_from", str(source))
    assert not (tmp_path / "cbgan" / "wide").exists()


def test_evaluating_what_is_not_a_run(run, tmp_path, capsys):
    assert "run: give the run's folder" in refused(capsys, cbgan.evaluate.main)
    assert "config.yaml" in refused(capsys, cbgan.evaluate.main, "--run", str(tmp_path))
    folder = str(tmp_path / "cbgan" / "run")
    assert "fid.every" in refused(capsys, cbgan.evaluate.main, "--run", folder)
    assert "samples" in refused(capsys, cbgan.evaluate.main, "--run", folder, "--samples", "1")
    (tmp_path / "mine.png").write_text("mine")
    line = refused(capsys, cbgan.evaluate.main, "--run", folder, "--grid", str(tmp_path / "mine.png"))
    assert "mine.png exists; add --force" in line
    assert (tmp_path / "mine.png").read_text() == "mine"
    flags = ["--epochs", "1", "--batch_size", "120", "--data.size", "8", "--out", str(tmp_path), "--name", "classifier"]
    cbcls.train.main(flags)
    classifier = str(tmp_path / "cbcls" / "classifier")
    line = refused(capsys, cbgan.evaluate.main, "--run", classifier)
    assert line == f"error: run: {classifier} is no run of a GAN (its networks: network); expected one of runs/cbgan"


def test_the_real_command_prints_the_line_and_exits_with_2(launch, tmp_path):
    done = launch("cbgan.train", "--out", str(tmp_path), "--norm.kind", "foo")
    assert done.returncode == 2
    assert done.stderr == "error: norm.kind: expected one of bn, in, dsbn, mn, scb, scb_base, ucb, none, got foo\n"
    assert done.stdout == ""
