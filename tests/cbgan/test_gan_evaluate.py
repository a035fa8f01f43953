"""Measuring any checkpoint or folder of images against any data set."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import cbgan.evaluate
import cbgan.train
from common.data.sets.digits import digits
from common.train.logging import read_metrics

FID = "metric/fid_classifier"


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def run(out) -> Path:
    """Train an epoch of eight steps with an average, measured before and after, on 256 samples."""
    cbgan.train.main(["--width", "8", "--batch_size", "125", "--lr", "0.1", "--latent_dim", "16", "--data.size", "8",
                      "--fid.samples", "256", "--ema_decay", "0.5", "--epochs", "1", "--checkpoint_keep", "1",
                      "--name", "run", "--out", str(out), "--cache", str(out / "cache")])  # fmt: skip
    return out / "cbgan" / "run"


def pictures(folder: Path, images: torch.Tensor) -> Path:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:04d}.png")
    return folder


def measured(folder: Path, *flags: str) -> dict:
    """Measure into a folder that holds nothing yet, and return what is written."""
    cbgan.evaluate.main([*flags, "--out", str(folder)])
    (file,) = folder.glob("*.json")
    assert {path.name for path in folder.iterdir()} == {
        file.name, f"{file.stem}-grid.png", f"{file.stem}-nearest.png"}  # fmt: skip
    return json.loads(file.read_text())


def test_a_run_is_measured_as_it_measured_itself(run, tmp_path, capsys):
    (line,) = [line for line in read_metrics(run) if FID in line and line["epoch"] == 1]
    record = measured(tmp_path, "--run", str(run))
    assert record["values"][FID] == line[FID]
    assert record["values"][f"{FID}_low"] == line[f"{FID}_low"] <= line[f"{FID}_centre"] <= line[f"{FID}_high"]
    out = capsys.readouterr().out
    assert f"{line[f'{FID}_low']:.4g} to {line[f'{FID}_high']:.4g} between the distributions (95 %)" in out
    assert f"FID-infinity {line[f'{FID}_infinity']:.4g}" in out
    assert f"against the test images: {line[f'{FID}_test']:.4g}" in out
    assert "quality: precision " in out
    assert ", recall " in out
    assert "of the samples are nearer to a training image than 99% of unseen images" in out
    assert next(tmp_path.glob("*-grid.png")).read_bytes() == (run / "samples" / "epoch-0001.png").read_bytes()
    with Image.open(next(tmp_path.glob("*-nearest.png"))) as sheet:
        assert sheet.size == (16 * 74 + 4, 4 * 88 + 4)  # sixteen tiles of 70 and their gap, four rows with captions


def test_raw_weights_and_kept_checkpoints_can_be_measured(run, tmp_path):
    averaged = measured(tmp_path / "a", "--run", str(run))
    raw = measured(tmp_path / "b", "--run", str(run), "--raw")
    assert raw["weights"] != averaged["weights"]
    assert raw["values"][FID] == read_metrics(run)[-1][f"{FID}_raw"] != averaged["values"][FID]
    kept = measured(tmp_path / "c", "--checkpoint", str(run / "checkpoints" / "epoch-0001.pt"))
    assert kept == averaged
    assert measured(tmp_path / "d", "--run", str(run), "--checkpoint", "1") == averaged


def test_a_run_is_measured_against_other_data_by_other_metrics(run, tmp_path, capsys):
    other = pictures(tmp_path / "noise" / "a", torch.randint(0, 256, (20, 3, 8, 8)).to(torch.uint8))
    pictures(other.parent / "b", torch.zeros(20, 3, 8, 8, dtype=torch.uint8))
    flags = ("--data.name", "imagefolder", "--data.root", str(other.parent))
    record = measured(tmp_path / "out", "--run", str(run), *flags, "--samples", "50", "--fid.metrics", "kid")
    assert record["protocol"]["data"] == "noise"
    assert (record["protocol"]["n_real"], record["samples"]) == (40, 50)
    assert set(record["classes"]) == {"a", "b"}
    assert "metric/kid_classifier" in record["values"]
    assert "metric/recall_classifier" not in record["values"]
    printed = capsys.readouterr()
    assert "logged:" not in printed.out
    assert printed.err.startswith("warning: fid.samples: 50 generated images are fewer than the 64 features")


def test_a_folder_of_training_images_is_found_out(out, tmp_path, capsys):
    train, test = digits(8).train, digits(8).test
    assert test is not None
    folder = pictures(tmp_path / "copies", train.images[:150])
    flags = ("--data.name", "digits", "--data.size", "8", "--cache", str(out / "cache"))
    grid = tmp_path / "grid.png"
    record = measured(tmp_path / "out", "--images", str(folder), *flags, "--samples", "140", "--grid", str(grid))
    assert record["samples"] == 140
    assert record["images"] == str(folder)
    assert record["values"]["metric/copies_classifier"] == 1
    assert record["values"]["metric/precision_classifier"] == 1
    assert "the generator gives back its training images" in capsys.readouterr().out
    assert grid.read_bytes() == next((tmp_path / "out").glob("*-grid.png")).read_bytes()
    with Image.open(next((tmp_path / "out").glob("*-nearest.png"))) as sheet:
        left, right = (sheet.crop((x, 7, x + 64, 71)) for x in (7, 81))
        assert left.tobytes() == right.tobytes()  # each beside itself
    fresh = pictures(tmp_path / "fresh", test.images[:150])
    cbgan.evaluate.main(["--images", str(fresh), *flags, "--out", str(tmp_path / "more")])
    assert "no sign of memorisation" in capsys.readouterr().out


def test_measurements_of_a_folder_are_written_here_by_default(out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "mine", digits(8).train.images[:10])
    flags = ["--images", "mine", "--data.name", "digits", "--data.size", "8", "--cache", str(out / "cache")]
    cbgan.evaluate.main(flags)
    before = {path.name: path.read_bytes() for path in Path("evaluations").iterdir()}
    assert len(before) == 3
    assert all(name.startswith("mine-10-samples-") for name in before)
    cbgan.evaluate.main(flags)
    assert {path.name: path.read_bytes() for path in Path("evaluations").iterdir()} == before
    cbgan.evaluate.main([*flags, "--fid.metrics", "inception_score"])
    assert len(list(Path("evaluations").glob("*.json"))) == 2
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].startswith("mine: FID (classifier) ")
    assert "warning: fid.samples: 10 generated images are fewer than the 64 features" in printed.err
