"""Runs side by side: FID over epochs and hours, samples, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused

import cbgan.compare
from cbgan.compare import _series, samples, training_hours
from common.reports.records import read_run

FID = "metric/fid_classifier"
SIDE = 8


def make_run(
    folder: Path, name: str, *, seed: int = 0, kind: str = "ucb", fids=(9.0, 3.0, 4.0), speed: float = 100.0,
    size: int = 32, count: int = 100, content: str = "abc", colour: int = 0, world: int = 1, final: int = 500,
) -> str:  # fmt: skip
    """Write a run of two epochs of five steps of 10 images, logged every five steps, measured three times."""
    path = folder / name
    (path / "samples").mkdir(parents=True)
    (path / "config.yaml").write_text(
        f"seed: {seed}\nbatch_size: 10\ngrad_accum_steps: 1\nnorm: {{kind: {kind}}}\n"
        f"data: {{name: digits, size: {size}}}\n"
        f"fid: {{samples: {count}, final_samples: {final}, reference: train, extractor: classifier}}\n"
    )
    lines = [{"step": 0, "epoch": 0, FID: fids[0], f"{FID}_floor": 2.0}]
    for epoch, fid in enumerate(fids[1:], 1):
        lines.append({"step": 5 * epoch, "epoch": epoch - 1, "time/images_per_second": speed * epoch})
        lines.append({"step": 5 * epoch, "epoch": epoch, FID: fid, f"{FID}_floor": 2.0})
    lines[-1] |= {f"{FID}_final": fids[-1] - 1, "metric/train_gap_classifier": 0.5}
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "environment.json").write_text(json.dumps({"sessions": [{"world": world}]}))
    protocol, better = {"extractor": "classifier", "content_hash": content}, {FID: "lower", f"{FID}_final": "lower"}
    (path / "summary.json").write_text(json.dumps({"protocol": protocol, "better": better}))
    for at, picture in enumerate(("real.png", "epoch-0001.png", "epoch-0002.png")):
        pixels = np.full((8 * (SIDE + 1) + 1, 8 * (SIDE + 1) + 1, 3), 10 * at + colour, dtype=np.uint8)
        pixels[4 * (SIDE + 1) + 1 :] = 255  # the lower rows
        Image.fromarray(pixels).save(path / "samples" / picture)
    return str(path)


@pytest.fixture
def runs(tmp_path) -> list[str]:
    return [
        make_run(tmp_path, "u0", fids=(9.0, 3.0, 4.0)),
        make_run(tmp_path, "u1", seed=1, fids=(9.5, 5.0, 4.5), speed=50.0),
        make_run(tmp_path, "b0", kind="bn", fids=(9.0, 7.0, 6.0), colour=100),
    ]


def test_hours_are_of_the_images_done_at_the_speed_they_were_done_at(tmp_path):
    hours = training_hours(read_run(Path(make_run(tmp_path, "run"))))
    assert hours == {0: 0.0, 5: pytest.approx(50 / 100 / 3600), 10: pytest.approx((50 / 100 + 50 / 200) / 3600)}
    many = training_hours(read_run(Path(make_run(tmp_path, "ranks", world=4))))
    assert many[10] == pytest.approx(4 * hours[10])
    with (tmp_path / "run" / "config.yaml").open("a") as file:
        file.write("grad_accum_steps: 3\n")
    assert training_hours(read_run(tmp_path / "run"))[10] == pytest.approx(3 * hours[10])


def test_a_line_is_drawn_at_epochs_or_at_the_hours_its_runs_took_on_average(runs):
    group = [read_run(Path(path)) for path in runs[:2]]
    assert _series(group, FID, "epoch") == [([0, 1, 2], [9.0, 3.0, 4.0]), ([0, 1, 2], [9.5, 5.0, 4.5])]
    drawn = _series(group, FID, "time")
    assert [ys for _, ys in drawn] == [[9.0, 3.0, 4.0], [9.5, 5.0, 4.5]]
    for xs, _ in drawn:
        assert xs == pytest.approx([0, (0.5 + 1) / 2 / 3600, (0.75 + 1.5) / 2 / 3600])


def test_samples_are_the_last_of_the_first_run_of_each_line_beside_real_ones(runs):
    first, _, other = (read_run(Path(path)) for path in runs)
    sheet, captions = samples({"UCB": [first], "BN": [other]})
    assert captions == ["real", "UCB", "BN"]
    assert sheet.shape == (3, 3, 4 * (SIDE + 1) + 1, 8 * (SIDE + 1) + 1)
    assert [int(each.min()) for each in sheet] == [int(each.max()) for each in sheet] == [0, 20, 120]
    assert sheet.dtype == torch.uint8


def test_three_figures_and_a_table_are_made(runs, tmp_path, capsys):
    out = tmp_path / "out"
    cbgan.compare.main([*runs, "--out", str(out)])
    names = [f"{name}.{kind}" for name in ("fid-epoch", "fid-time", "samples") for kind in ("png", "svg")]
    assert sorted(path.name for path in out.iterdir()) == names
    text = (out / "fid-epoch.svg").read_text()
    for part in ("ucb (n = 2)", "bn (n = 1)", "FID (classifier)", "real test images (2)", "<!-- epoch -->"):
        assert part in text or part.replace(" ", "&#160;") in text, part
    assert "hours of training" in (out / "fid-time.svg").read_text()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| | seeds | FID (classifier), last | lowest | hours of training |"
    assert lines[2:4] == [
        "| ucb | 0 1 | 4.25 ± 0.35 | 3.75 ± 1.1 | 0.0003125 ± 0.00015 |",  # lowest: 3 and 4.5
        "| bn | 0 | 6 | 6 | 0.0002083 |",
    ]
    assert lines[-1].startswith(f"written: {out / 'fid-epoch.png'}, ")
    line = refused(capsys, cbgan.compare.main, "--runs", *runs, "--out", str(out))
    assert line.startswith(f"error: out: {out / 'fid-epoch.png'} exists; add --force")
    cbgan.compare.main([*runs, "--out", str(out), "--force", "--label", "A", "B", "--log_y"])
    assert "| A | 0 1 |" in capsys.readouterr().out
    for tag, row in ((f"{FID}_final", "| bn | 0 | 5 | 5 | 0.0002083 |"),
                     ("metric/train_gap_classifier", "| bn | 0 | 0.5 | 0.0002083 |")):  # fmt: skip
        cbgan.compare.main([*runs, "--out", str(out), "--force", "--tag", tag])
        assert row in capsys.readouterr().out.splitlines()  # of the train gap there is no best


def test_unlike_protocols_are_refused_by_the_name_of_what_differs(tmp_path, capsys):
    one = make_run(tmp_path, "a")
    others = {
        make_run(tmp_path, "b", seed=1, count=50): "fid.samples is 100 in {} and 50 in {}, so their distances do not "
        "compare",
        make_run(tmp_path, "c", seed=1, size=16): "data.size is 32 in {} and 16 in {}",
        make_run(tmp_path, "d", seed=1, content="xyz"): "{} and {} were measured otherwise (content_hash differ)",
    }
    for other, what in others.items():
        line = refused(capsys, cbgan.compare.main, one, other, "--out", str(tmp_path / "out"))
        assert what.format(one, other) in line
    assert not (tmp_path / "out").exists()
    final = make_run(tmp_path, "e", seed=1, final=600)
    line = refused(capsys, cbgan.compare.main, one, final, "--tag", f"{FID}_final", "--out", str(tmp_path / "out"))
    assert f"fid.final_samples is 500 in {one} and 600 in {final}" in line
    cbgan.compare.main([one, final, "--out", str(tmp_path / "out"), "--label", "A", "B"])  # alike but for the end


def test_what_cannot_be_compared_is_one_line(runs, tmp_path, capsys):
    def line(*flags: str) -> str:
        return refused(capsys, cbgan.compare.main, *flags, "--out", str(tmp_path / "out"))

    assert "runs: name the runs' folders" in line()
    assert "is not a run's folder" in line(str(tmp_path))
    assert f"tag: {runs[0]} has no metric/x" in line(*runs, "--tag", "metric/x")
    (Path(runs[2]) / "samples" / "epoch-0002.png").unlink()
    (Path(runs[2]) / "samples" / "epoch-0001.png").unlink()
    assert f"runs: {runs[2]} has no samples/epoch-*.png" in line(*runs)
    Image.new("RGB", (81, 81)).save(Path(runs[2]) / "samples" / "epoch-0002.png")
    assert f"samples of {runs[2]} are of another size than those of {runs[0]}" in line(*runs)
    uneven = make_run(tmp_path, "u2", seed=2, fids=(9.0, 3.0))
    assert "its runs have different x" in line(runs[0], uneven)
    assert not (tmp_path / "out" / "fid-epoch.png").exists()
