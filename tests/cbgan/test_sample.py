"""What the command draws, and generators apart from their runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused

import cbgan
import cbgan.sample
from cbgan.config import GanConfig
from cbgan.evaluation import recalibrate
from cbgan.export import load_generator
from cbgan.networks.dcgan import Discriminator, Generator
from cbgan.noise import between, numbered_noise
from common.data import DataConfig
from common.data.image_set import to_uint8
from common.norms.config import NormConfig
from common.runtime.device import memory_format
from common.train.checkpoint import Checkpoints
from common.train.config import RecalibrateConfig, stored_yaml

CPU = torch.device("cpu")
NAMES = ("cat", "dog", "eel")


def make_run(folder: Path, kind: str, average: bool = False) -> tuple[Path, GanConfig]:
    """Write a run of images of 8 pixels as training would leave it, after 3 epochs, its weights random."""
    cfg = GanConfig(
        width=8, latent_dim=4, batch_size=4, data=DataConfig(size=8), ema_decay=0.9 * average,
        norm=NormConfig(kind=kind, num_components=3), recalibrate=RecalibrateConfig(images=8, batch_size=4),
    ).resolved()  # fmt: skip
    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        g = Generator(8, 4, cfg.norm, 8)
        for parameter in g.parameters():
            torch.nn.init.normal_(parameter, 0.0, 0.5)
        networks.append(g.state_dict())
    state = {
        "run": {"epoch": 3, "step": 30},
        "networks": {"g": networks[0], "d": Discriminator(8, 8).state_dict()},
        "averages": {"g": networks[1]} if average else {},
        "statistics": {},  # as of a checkpoint that was not measured
    }
    Checkpoints(folder / "checkpoints").save(30, state)
    (folder / "config.yaml").write_text(stored_yaml(cfg))
    if cfg.conditional:
        (folder / "classes.json").write_text(json.dumps({"classes": NAMES, "counts": [1, 0, 3]}))
    return folder, cfg


def generator(folder: Path, cfg: GanConfig, which: str = "networks") -> Generator:
    g = Generator(8, 4, cfg.norm, 8).to(memory_format=memory_format(cfg.channels_last))  # pyright: ignore[reportCallIssue]
    g.load_state_dict(torch.load(folder / "checkpoints" / "step-00000030.pt", weights_only=True)[which]["g"])
    recalibrate(cfg, g, [1, 0, 3] if cfg.conditional else [], CPU)
    return g.eval()


def pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def tile(path: Path, row: int, column: int) -> torch.Tensor:
    top, left = 1 + 9 * row, 1 + 9 * column
    return pixels(path)[:, top : top + 8, left : left + 8]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def plain(tmp_path) -> Path:
    return make_run(tmp_path / "plain", "ucb", average=True)[0]


@pytest.fixture
def by_class(tmp_path) -> Path:
    return make_run(tmp_path / "by_class", "scb")[0]


def draw(*flags: str | Path) -> None:
    cbgan.sample.main([str(flag) for flag in flags])


@torch.no_grad()
def test_a_grid_is_what_the_average_makes_of_numbered_noise(plain, capsys):
    cfg = load_generator(plain).cfg
    draw("--run", plain, "--count", "9", "--seed", "5")
    want = to_uint8(generator(plain, cfg, "averages")(numbered_noise(0, 9, 4, 5)))
    assert torch.equal(tile(Path("generated.png"), 1, 2), want[5])
    assert pixels(Path("generated.png")).shape == (3, 28, 28)
    assert "9 images of epoch 3, seed 5: generated.png" in capsys.readouterr().out
    draw("--run", plain, "--count", "9", "--seed", "5", "--raw", "--out", "raw.png", "--truncation", "0.5")
    want = to_uint8(generator(plain, cfg)(numbered_noise(0, 9, 4, 5, limit=0.5)))
    assert torch.equal(tile(Path("raw.png"), 2, 0), want[6])
    draw("--checkpoint", plain / "checkpoints" / "step-00000030.pt", "--count", "9", "--seed", "5", "--out", "file.png")
    assert Path("file.png").read_bytes() == Path("generated.png").read_bytes()


def test_single_images_do_not_depend_on_how_many_there_are(plain, by_class, monkeypatch):
    monkeypatch.setattr(cbgan.sample, "_CHUNK", 4)
    draw("--run", plain, "--what", "images", "--count", "10", "--out", "many")
    draw("--run", plain, "--what", "images", "--count", "3", "--out", "few")
    assert sorted(path.name for path in Path("many").iterdir()) == [f"{i:06}.png" for i in range(10)]
    for path in Path("few").iterdir():
        assert path.read_bytes() == (Path("many") / path.name).read_bytes()
    assert len({path.read_bytes() for path in Path("many").iterdir()}) == 10
    draw("--run", by_class, "--what", "images", "--count", "40", "--out", "sorted")
    found = {path.name: len(list(path.iterdir())) for path in Path("sorted").iterdir()}
    assert found.keys() == {"cat", "eel"}  # no image of a class that training had none of
    assert found["eel"] > found["cat"]
    draw("--run", by_class, "--what", "images", "--count", "6", "--out", "asked", "--classes", "dog", "cat")
    names = {str(path.relative_to("asked")) for path in Path("asked").rglob("*.png")}
    assert names == {f"{('dog', 'cat')[i % 2]}/{i:06}.png" for i in range(6)}


@torch.no_grad()
def test_a_sheet_has_a_row_a_class_of_the_same_noise(by_class, capsys):
    draw("--run", by_class, "--what", "classes", "--count", "2")
    g = generator(by_class, load_generator(by_class).cfg)
    rows = [to_uint8(g(numbered_noise(0, 2, 4, 0), torch.tensor([row, row]))) for row in range(3)]
    for row in range(3):
        assert torch.equal(tile(Path("generated.png"), row, 1), rows[row][1])
    assert "6 images of epoch 3" in capsys.readouterr().out
    draw("--run", by_class, "--what", "classes", "--count", "2", "--classes", "eel", "--force")
    assert torch.equal(tile(Path("generated.png"), 0, 1), rows[2][1])


@torch.no_grad()
def test_a_walk_is_a_strip_and_a_moving_picture(by_class):
    draw("--run", by_class, "--what", "walk", "--count", "2", "--classes", "dog")
    walk = between(numbered_noise(0, 2, 4, 0), 12).flatten(0, 1)
    want = to_uint8(generator(by_class, load_generator(by_class).cfg)(walk, torch.ones(24, dtype=torch.int64)))
    assert torch.equal(tile(Path("generated.png"), 1, 3), want[15])
    with Image.open("generated.gif") as movie:
        assert movie.n_frames == 24  # pyright: ignore[reportAttributeAccessIssue]
        assert movie.size == (128, 128)
        assert movie.info["loop"] == 0
        movie.seek(15)
        error = np.abs(np.array(movie.convert("RGB"))[::16, ::16].astype(int) - want[15].permute(1, 2, 0).numpy())
    assert error.mean() < 8  # a palette of 256 colours


@pytest.mark.parametrize("kind", ["ucb", "mn", "scb"])
@torch.no_grad()
def test_an_exported_generator_makes_the_runs_images(tmp_path, kind):
    folder, cfg = make_run(tmp_path / kind, kind)
    draw("--run", folder, "--export", "model")
    z, labels = numbered_noise(0, 5, 4, 0), torch.tensor([0, 2, 2, 1, 0])
    asked = (labels,) if kind == "scb" else ()
    want = generator(folder, cfg)(z, *asked)
    found = cbgan.load_generator("model")
    assert torch.equal(found.network(z, *asked), want)
    assert (found.classes, found.counts, found.epoch) == ((NAMES, (1, 0, 3), 3) if asked else ((), (), 3))
    program = torch.export.load("model/generator.pt2").module()
    torch.testing.assert_close(program(z, *asked), want, atol=1e-5, rtol=1e-5)  # pyright: ignore[reportCallIssue]
    assert program(z[:1], *(t[:1] for t in asked)).shape == (1, 3, 8, 8)  # pyright: ignore[reportCallIssue]
    draw("--run", "model", "--count", "4", "--out", "exported.png")
    draw("--run", folder, "--count", "4", "--out", "run.png")
    assert Path("exported.png").read_bytes() == Path("run.png").read_bytes()


def test_an_export_that_does_not_make_the_same_images_is_a_fault(plain, monkeypatch):
    found = load_generator(plain)
    sound = cbgan.export.load_generator

    def other(*args, **kwargs):
        again = sound(*args, **kwargs)
        next(again.network.parameters()).mul_(2)
        return again

    monkeypatch.setattr("cbgan.export.load_generator", other)
    with pytest.raises(RuntimeError, match="makes other images"):
        found.save(Path("model"))


def test_mistakes_are_one_line_and_nothing_is_written(plain, by_class, tmp_path, capsys):
    def line(*flags: str | Path) -> str:
        return refused(capsys, cbgan.sample.main, *map(str, flags))

    before = sorted(tmp_path.rglob("*"))
    assert "run: give the run's folder" in line()
    assert "holds no config.yaml" in line("--run", tmp_path)
    assert "classes: expected some of cat, dog, eel, got cow" in line("--run", by_class, "--classes", "cat", "cow")
    assert "with ucb cannot be asked for any, got cat" in line("--run", plain, "--classes", "cat")
    assert "what: classes needs a generator" in line("--run", plain, "--what", "classes")
    assert "count: expected at least 2, got 1" in line("--run", plain, "--what", "walk", "--count", "1")
    assert "count: expected at least 1, got 0" in line("--run", plain, "--count", "0")
    assert "truncation: expected more than 0, got 0" in line("--run", plain, "--truncation", "0")
    assert "seed: expected 0 or more, got -1" in line("--run", plain, "--seed", "-1")
    assert "checkpoint" in line("--run", plain, "--checkpoint", "best")
    assert "ends in .png, got a.jpg" in line("--run", plain, "--out", "a.jpg")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_there_is_kept(plain, by_class, capsys):
    Path("generated.gif").write_text("mine")
    walk = ("--run", by_class, "--what", "walk", "--count", "2")
    assert "generated.gif exists; add --force" in refused(capsys, cbgan.sample.main, *map(str, walk))
    Path("generated.png").write_text("mine")
    assert "generated.png exists; add --force" in refused(capsys, cbgan.sample.main, "--run", str(plain))
    Path("generated").mkdir()
    Path("generated/mine.png").write_text("mine")
    images = ("--run", str(plain), "--what", "images", "--force")
    assert "generated exists and is no empty folder" in refused(capsys, cbgan.sample.main, *images)
    assert {path.read_text() for path in Path().glob("generated*") if path.is_file()} == {"mine"}
    draw("--run", plain, "--export", "model")
    assert "model holds a model already" in refused(capsys, cbgan.sample.main, "--run", str(plain), "--export", "model")


def test_runs_that_cannot_be_read(plain, by_class, tmp_path, capsys):
    def line(folder: Path) -> str:
        return refused(capsys, cbgan.sample.main, "--run", str(folder))

    config = (plain / "config.yaml").read_text()
    (plain / "config.yaml").write_text(config.replace("width: 8", "width: 16"))
    assert "are not of its config.yaml" in line(plain)  # the checkpoint of another configuration
    (plain / "config.yaml").write_text(config)
    (by_class / "classes.json").write_text('{"classes": ["cat"]}')
    assert "classes.json cannot be read" in line(by_class)
    stray = tmp_path / "stray.pt"
    stray.write_bytes(b"")
    assert "holds no config.yaml" in refused(capsys, cbgan.sample.main, "--checkpoint", str(stray))
