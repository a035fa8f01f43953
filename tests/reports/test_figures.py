import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from refusals import refused

import common.figures
from common.reports import figures
from common.reports.figures import Curves, curve_panels, curves, grid
from common.runtime.seeding import generator

X = [0.0, 10.0, 20.0, 30.0]
RUNS = [(X, [80.0, 50.0, 30.0, 20.0]), (X, [70.0, 55.0, 33.0, 29.0]), (X, [90.0, 60.0, 27.0, 14.0])]
ONE = [1.0] * 4
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"


def points(svg: Path, style: str) -> list[tuple[float, float]]:
    """Return the vertices of the first path drawn in a style that is no marker and no line of the legend."""
    space = {"s": "http://www.w3.org/2000/svg", "x": "http://www.w3.org/1999/xlink"}
    axes = ET.parse(svg).getroot().find(".//*[@id='axes_1']")
    assert axes is not None
    paths = {path.get("id", str(i)): path for i, path in enumerate(axes.iterfind(".//s:path", space))}
    drawn = [(path.get("style", ""), path, 0.0) for path in paths.values()]
    for use in axes.iterfind(".//s:use", space):  # a band is defined once, then put in its place
        target = use.get(f"{{{space['x']}}}href", "")[1:]
        drawn.append((use.get("style", ""), paths[target], float(use.get("y", "0"))))
    for found, path, down in drawn:
        pairs = re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path.get("d", ""))
        if re.search(style, found) and len(pairs) >= len(X):
            return [(float(x), float(y) + down) for x, y in pairs]
    raise AssertionError(f"no path has {style}")


@pytest.mark.parametrize("log_y", [False, True])
def test_line_and_band_are_where_mean_and_deviation_are(tmp_path, log_y):
    ruler = {"ten": [(X, [10.0] * 4)], "hundred": [(X, [100.0] * 4)]}  # two known heights give the scale
    curves(tmp_path / "f", {"UCB": RUNS, **ruler}, xlabel="epoch", ylabel="FID", log_y=log_y)
    scale = math.log if log_y else float
    ten, hundred = (points(tmp_path / "f.svg", f"fill: none; stroke: {c}")[0][1] for c in (ORANGE, GREEN))

    def height(pixel: float) -> float:
        value = scale(10) + (pixel - ten) / (hundred - ten) * (scale(100) - scale(10))
        return math.exp(value) if log_y else value

    values = np.array([y for _, y in RUNS])
    mean = values.sum(0) / 3
    deviation = (((values - mean) ** 2).sum(0) / 2) ** 0.5
    line = points(tmp_path / "f.svg", f"fill: none; stroke: {BLUE}")
    # Coordinates in the file have six decimals; the axis is some 250 units for a range of about 100.
    assert [height(y) for _, y in line] == pytest.approx(mean.tolist(), rel=1e-5)
    band = points(tmp_path / "f.svg", f"fill: {BLUE}; fill-opacity: 0.18")
    for at, low, high in zip(line, mean - deviation, mean + deviation, strict=True):
        ys = [height(y) for x, y in band if abs(x - at[0]) < 1e-3]
        assert (min(ys), max(ys)) == pytest.approx((low, high), rel=1e-5)


def test_a_band_that_would_reach_zero_on_a_logarithmic_axis_ends_at_the_lowest_run(tmp_path):
    runs = [(X, [1.0] * 4), (X, [100.0] * 4)]  # mean 50.5, deviation 70.0
    ruler = {"ten": [(X, [10.0] * 4)], "hundred": [(X, [100.0] * 4)]}
    curves(tmp_path / "f", {"a": runs, **ruler}, xlabel="x", ylabel="y", log_y=True)
    ten, hundred = (points(tmp_path / "f.svg", f"fill: none; stroke: {c}")[0][1] for c in (ORANGE, GREEN))
    lowest = max(y for _, y in points(tmp_path / "f.svg", f"fill: {BLUE}; fill-opacity"))  # SVG counts downwards
    assert 10 ** (1 + (lowest - ten) / (hundred - ten)) == pytest.approx(1.0, rel=1e-3)


def test_the_legend_counts_runs_and_keeps_odd_labels(tmp_path):
    series = {"UCB": RUNS, "_one": RUNS[:1], "$a$ & <b>": RUNS[:2]}
    curves(tmp_path / "f.png", series, xlabel="epoch", ylabel="FID", title="Digits", floor=12.34, floor_label="real")
    text = (tmp_path / "f.svg").read_text()
    shown = [line.strip() for line in re.findall(r"<!--(.*?)-->", text)]
    for words in ("UCB (n = 3)", "_one (n = 1)", "mean ± standard deviation", "real (12.3)", "epoch", "FID", "Digits"):
        assert words in shown
    assert any("$a$" in words and "(n = 2)" in words for words in shown)
    curves(tmp_path / "g", {"one": RUNS[:1]}, xlabel="epoch", ylabel="FID")
    assert "deviation" not in (tmp_path / "g.svg").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.png", "f.svg", "g.png", "g.svg"]


def test_bytes_repeat_whatever_the_program_has_set_and_leave_it_alone(tmp_path):
    images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)

    def draw(name: str) -> list[bytes]:
        files = curves(tmp_path / name, {"UCB": RUNS, "b": RUNS[1:]}, xlabel="x", ylabel="y", floor=9)
        files += grid(tmp_path / f"{name}-grid", images, captions=["a", "b", "c"])
        return [path.read_bytes() for path in files]

    first = draw("first")
    assert not any(b"<dc:date>" in content for content in first)
    with mpl.rc_context({"lines.linewidth": 9, "font.size": 30, "svg.hashsalt": None, "text.usetex": True}):
        before = dict(mpl.rcParams.copy())
        assert draw("second") == first
        assert dict(mpl.rcParams.copy()) == before


def test_importing_chooses_no_backend():
    code = (
        "import matplotlib, sys, common.figures; assert 'matplotlib.pyplot' not in sys.modules; "
        "import matplotlib.pyplot; print(matplotlib.get_backend())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
        env=os.environ | {"MPLBACKEND": "svg"},
    )  # fmt: skip
    assert done.stdout.strip() == "svg"


BAD_SERIES = {
    "nothing": ({}, "series"),
    "no runs": ({"MN": []}, "MN: expected at least one run"),
    "other x": ({"MN": [(X, ONE), ([0, 10, 20, 31], ONE)]}, "MN: .* different x .4 from 0 to 30 and 4 from 0 to 31"),
    "shorter": ({"fine": RUNS, "MN": [*RUNS, (X[:3], X[:3])]}, "MN: its runs have different x"),
    "lengths": ({"MN": [(X, X[:3])]}, "MN: expected x and y of one length"),
    "empty": ({"MN": [([], [])]}, "MN: expected x and y of one length"),
    "nan": ({"MN": [(X, [1, 2, 3, math.nan])]}, "MN: expected finite"),
    "zero": ({"MN": [(X, [1, 2, 3, 0])]}, "MN: expected values above 0"),
}  # fmt: skip


def test_bad_series_name_the_label_and_write_nothing(tmp_path):
    for series, message in BAD_SERIES.values():
        with pytest.raises(ValueError, match=message):
            curves(tmp_path / "f", series, xlabel="x", ylabel="y", log_y=True)
    with pytest.raises(ValueError, match="floor"):
        curves(tmp_path / "f", {"a": RUNS}, xlabel="x", ylabel="y", log_y=True, floor=0.0)
    assert not list(tmp_path.iterdir())


def test_pictures_are_enlarged_pixel_by_pixel(tmp_path):
    for columns, shape in ((None, (2, 3)), (5, (1, 5)), (2, (3, 2)), (9, (1, 5))):
        images = torch.randint(0, 256, (5, 3, 6, 9), generator=generator(0, "grid")).to(torch.uint8)
        grid(tmp_path / "g", images, columns=columns)
        drawn = np.asarray(Image.open(tmp_path / "g.png").convert("RGB"))
        rows, across = shape
        factor, rest = divmod(drawn.shape[1], across * 10 + 1)  # nine pixels and one between
        assert rest == 0
        assert drawn.shape[0] == factor * (rows * 7 + 1)
        small = drawn[factor // 2 :: factor, factor // 2 :: factor]
        assert np.array_equal(np.kron(small, np.ones((factor, factor, 1))), drawn)
        for i, image in enumerate(images):
            top, left = 1 + i // across * 7, 1 + i % across * 10
            assert np.array_equal(small[top : top + 6, left : left + 9], image.permute(1, 2, 0).numpy())
        ET.parse(tmp_path / "g.svg")


def test_captions_leave_the_pictures_whole(tmp_path):
    images = torch.randint(0, 200, (4, 3, 8, 8), generator=generator(1, "grid")).to(torch.uint8)
    grid(tmp_path / "g", images, captions=["zero", "one", "", "a very long caption indeed"])
    drawn = np.asarray(Image.open(tmp_path / "g.png").convert("RGB"))
    factor = drawn.shape[1] // 19
    small = drawn[factor // 2 :: factor, factor // 2 :: factor]
    cell = (len(small) - 1) // 2
    for i, image in enumerate(images):
        top, left = 1 + i // 2 * cell, 1 + i % 2 * 9
        assert np.array_equal(small[top : top + 8, left : left + 8], image.permute(1, 2, 0).numpy())
    below = [drawn[(9 + i // 2 * cell) * factor : cell * (1 + i // 2) * factor,
                   (1 + i % 2 * 9) * factor : (9 + i % 2 * 9) * factor] for i in range(4)]  # fmt: skip
    assert [bool((strip < 128).any()) for strip in below] == [True, True, False, True]


def test_bad_grids_name_the_argument(tmp_path):
    sound = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    for images in (sound.float(), sound[:, :1], sound[:0]):
        with pytest.raises(ValueError, match="images: expected uint8"):
            grid(tmp_path / "g", images)
    with pytest.raises(ValueError, match="columns: expected at least 1"):
        grid(tmp_path / "g", sound, columns=0)
    with pytest.raises(ValueError, match="captions: expected one for each of 2"):
        grid(tmp_path / "g", sound, captions=["a"])
    assert not list(tmp_path.iterdir())


TAG = "metric/fid_classifier"


def make_run(folder: Path, name: str, *, seed: int, kind: str = "ucb", floor: float = 3.0, epochs=(0, 10)) -> str:
    path = folder / name
    path.mkdir()
    (path / "config.yaml").write_text(f"seed: {seed}\nnorm: {{kind: {kind}}}\n")
    lines = [{"step": 8 * e, "epoch": e, TAG: 50.0 - e - seed, f"{TAG}_floor": floor} for e in epochs]
    lines += [{"step": s, "epoch": 0, "loss/d": 1.0} for s in (3, 6)] + [{"step": 9, "epoch": 1, TAG: None}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_the_command_joins_runs_that_differ_by_seed_alone(tmp_path, capsys):
    names = {"ucb-seed0": 0, "ucb-seed1": 1, "odd": 2}
    runs = [make_run(tmp_path, name, seed=seed) for name, seed in names.items()]
    other = make_run(tmp_path, "bn-seed0", seed=0, kind="bn")
    common.figures.main(["--runs", *runs[:2], other, "--out", f"{tmp_path}/fid"])
    told = capsys.readouterr().out.splitlines()
    assert told == [
        f"ucb: {runs[0]}, {runs[1]}",
        f"bn: {other}",
        f"written: {tmp_path}/fid.png, {tmp_path}/fid.svg",
    ]
    text = (tmp_path / "fid.svg").read_text()
    for words in ("ucb (n = 2)", "bn (n = 1)", "real test images (3)", TAG):
        assert words in text
    common.figures.main(["--runs", *runs, "--out", f"{tmp_path}/all.svg"])
    assert "ucb-seed0, ucb-seed1, odd (n = 3)" in (tmp_path / "all.svg").read_text()


def test_several_values_have_a_panel_each_and_one_legend(tmp_path):
    runs = [make_run(tmp_path, name, seed=seed) for name, seed in (("a", 0), ("b", 1))]
    other = make_run(tmp_path, "bn", seed=0, kind="bn")
    for run in (*runs, other):
        with Path(run, "metrics.jsonl").open("a") as file:
            file.write('{"step": 0, "epoch": 0, "loss/test": 2.0}\n{"step": 80, "epoch": 10, "loss/test": 1.0}\n')
    argv = ["--runs", *runs, other, "--out", f"{tmp_path}/f", "--tag", TAG, "loss/test", "--title", "both"]
    common.figures.main(argv)
    text = (tmp_path / "f.svg").read_text()
    shown = [line.strip() for line in re.findall(r"<!--(.*?)-->", text)]
    for words, count in ((TAG, 1), ("loss/test", 1), ("ucb (n = 2)", 1), ("bn (n = 1)", 1), ("both", 1), ("epoch", 2)):
        assert shown.count(words) == count, words
    assert text.count('<g id="axes_') == 2
    assert "real test images (3)" in shown
    for colour in (BLUE, ORANGE):
        assert len(re.findall(f"fill: none; stroke: {colour}; stroke-width: 1.8", text)) == 3  # twice, and the legend


def test_panels_stand_two_or_three_a_row(tmp_path):
    for count, wide in ((3, 3), (4, 2)):
        panels = [Curves({"a": [(X, ONE)]}, "y")] * count
        curve_panels(tmp_path / "f", panels, xlabel="x")
        with Image.open(tmp_path / "f.png") as image:
            width, height = image.size
        assert width / height == pytest.approx(4.2 * wide / (3.1 * count / wide + 0.25), rel=0.01)  # the legend


def test_the_legend_of_several_panels_stands_below_them_and_the_panels_fill_the_rest(tmp_path, monkeypatch):
    made: list[Figure] = []
    monkeypatch.setattr(figures, "write_figure", lambda figure, path: made.append(figure))
    names = ("ucb", "bn", "mn, groups 1", "scb, statistics batch, num_components 10")
    for count in (2, 3, 4):
        panels = [Curves({name: [(X, ONE)] for name in names}, "y", floor=2.0)] * count
        curve_panels(tmp_path / "f", panels, xlabel="x", title="both")
        figure = made[-1]
        FigureCanvasAgg(figure).draw()
        (legend,), (width, height) = figure.legends, figure.get_size_inches() * figure.dpi
        box = legend.get_window_extent()
        panes = [axes.get_window_extent() for axes in figure.axes]
        assert min(box.x0, box.y0, width - box.x1) >= 0
        assert box.y1 < min(pane.y0 for pane in panes)
        assert sum(pane.width * pane.height for pane in panes) > 0.45 * width * height


def test_what_follows_from_the_kind_of_layer_is_not_named(tmp_path, capsys):
    norms = {
        "a": "kind: ucb, affine: true, init: uniform",
        "b": "kind: in, affine: false",
        "c": "kind: bn, affine: true",
    }
    runs = [make_run(tmp_path, name, seed=0) for name in norms]
    for run, norm in zip(runs, norms.values(), strict=True):
        Path(run, "config.yaml").write_text(f"seed: 0\nnorm: {{{norm}}}\n")
    common.figures.main(["--runs", *runs, "--out", f"{tmp_path}/f"])
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()[:3]] == ["ucb", "in", "bn"]
    Path(runs[2], "config.yaml").write_text("seed: 0\nnorm: {kind: bn, affine: false}\n")
    common.figures.main(["--runs", *runs, "--out", f"{tmp_path}/f", "--force"])
    assert "bn, norm.affine false: " in capsys.readouterr().out


def test_the_legend_names_what_differs(tmp_path, capsys):
    norms = {"a": "kind: ucb, num_components: 3, groups: null", "b": "kind: ucb, num_components: 3, groups: 1",
             "c": "kind: bn, num_components: 5"}  # fmt: skip
    runs = [make_run(tmp_path, name, seed=0) for name in norms]
    for run, norm in zip(runs, norms.values(), strict=True):
        Path(run, "config.yaml").write_text(f"seed: 0\nnorm: {{{norm}}}\ncache: /{Path(run).name}\n")
    out = ["--out", f"{tmp_path}/f", "--force"]
    common.figures.main(["--runs", *runs, *out])
    names = [line.split(": /")[0] for line in capsys.readouterr().out.splitlines()[:3]]
    assert names == [
        "ucb, norm.groups null",
        "ucb, norm.groups 1",
        "bn",
    ]  # neither components nor groups mean it a thing
    common.figures.main(["--runs", *runs, *out, "--label", "joint", "1", "BatchNorm"])
    names = [line.split(": /")[0] for line in capsys.readouterr().out.splitlines()[:3]]
    assert names == ["joint", "1", "BatchNorm"]
    for label in ("joint (n = 1)", "BatchNorm (n = 1)"):
        assert label in (tmp_path / "f.svg").read_text()
    for wrong in (["joint"], ["a", "b", "a"]):
        line = refused(capsys, common.figures.main, "--runs", *runs, *out, "--label", *wrong)
        assert f"label: expected 3 different names, for a; b; c; got {', '.join(wrong)}" in line


def test_lines_that_differ_by_place_alone_are_told_apart_by_it(tmp_path, capsys):
    runs = [make_run(tmp_path, name, seed=0) for name in ("a", "b")]
    for run in runs:
        Path(run, "config.yaml").write_text(f"seed: 0\nnorm: {{kind: bn}}\ndevice: {Path(run).name}\n")
    common.figures.main(["--runs", *runs, "--out", f"{tmp_path}/f"])
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()[:2]] == ["device a", "device b"]


def test_unlike_runs_are_refused_as_tables_do(tmp_path, capsys):
    runs = [make_run(tmp_path, "a", seed=0), make_run(tmp_path, "b", seed=0, kind="bn", floor=4.0)]
    argv = ["--runs", *runs, "--out", f"{tmp_path}/f"]
    assert f"{TAG}_floor is 3 in {runs[0]} and 4 in {runs[1]}" in refused(capsys, common.figures.main, *argv)
    runs[1] = make_run(tmp_path, "c", seed=0, kind="bn", floor=3.02)
    for run, count in zip(runs, (1000, 500), strict=True):
        Path(run, "summary.json").write_text(json.dumps({"protocol": {"n_real": count}}))
    argv[1:3] = runs
    assert f"{runs[0]} and {runs[1]} were measured otherwise (n_real differ)" in refused(
        capsys, common.figures.main, *argv
    )
    assert not list(tmp_path.glob("f.*"))
    common.figures.main([*argv, "--tag", "loss/d", "--x", "step"])  # which does not depend on it


def test_bad_input_is_one_line(tmp_path, capsys):
    run = make_run(tmp_path, "a-seed0", seed=0)
    out = ["--out", f"{tmp_path}/f"]
    assert "runs: name at least one" in refused(capsys, common.figures.main, *out)
    assert "argument --runs: expected at least one argument" in refused(capsys, common.figures.main, "--runs", *out)
    assert "out: expected the figure's path" in refused(capsys, common.figures.main, "--runs", run)
    assert "out: expected the figure's path" in refused(
        capsys, common.figures.main, "--runs", run, "--out", f"{tmp_path}/.png"
    )
    assert "is not a run's folder" in refused(capsys, common.figures.main, "--runs", f"{tmp_path}", *out)
    assert f"{Path.home()}/ghost is not a run's folder" in refused(
        capsys, common.figures.main, "--runs", "~/ghost", *out
    )
    assert "has no loss/g; it has loss/d, metric/fid" in refused(
        capsys, common.figures.main, "--runs", run, "--tag", "loss/g", *out
    )
    assert "tag: " in refused(capsys, common.figures.main, "--runs", run, *out, "--tag")
    assert "use --x step" in refused(capsys, common.figures.main, "--runs", run, "--tag", "loss/d", *out)
    assert "same settings and seed" in refused(capsys, common.figures.main, "--runs", run, run, *out)
    longer = make_run(tmp_path, "a-seed1", seed=1, epochs=(0, 10, 20))
    assert "a: its runs have different x" in refused(capsys, common.figures.main, "--runs", run, longer, *out)
    (tmp_path / "file").write_text("")
    assert "out: cannot write" in refused(capsys, common.figures.main, "--runs", run, "--out", f"{tmp_path}/file/f")
    (Path(run) / "metrics.jsonl").write_text(f'{{"step": 1, "epoch": 1, "{TAG}": null}}\n')
    assert f"{TAG} is not finite anywhere in {run}" in refused(capsys, common.figures.main, "--runs", run, *out)
    for name, text in (("config.yaml", "a: ["), ("config.yaml", "- 1"), ("metrics.jsonl", "7\n"),
                       ("metrics.jsonl", f'{{"epoch": 1, "{TAG}": "low"}}\n')):  # fmt: skip
        before = Path(run, name).read_text()
        Path(run, name).write_text(text)
        assert f"runs: {run}" in refused(capsys, common.figures.main, "--runs", run, *out)
        Path(run, name).write_text(before)
    assert not list(tmp_path.glob("f.*"))


def test_an_existing_figure_is_replaced_only_by_force(tmp_path, capsys):
    run = make_run(tmp_path, "a-seed0", seed=0)
    (tmp_path / "f.svg").write_text("mine")
    argv = ["--runs", run, "--out", f"{tmp_path}/f"]
    assert f"out: {tmp_path}/f.svg exists; add --force" in refused(capsys, common.figures.main, *argv)
    assert (tmp_path / "f.svg").read_text() == "mine"
    assert not (tmp_path / "f.png").exists()
    common.figures.main([*argv, "--force", "--tag", "loss/d", "--x", "step"])
    assert "loss/d" in (tmp_path / "f.svg").read_text()
