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
from common.reports.figures import Curves, curves, grid
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
    curves(tmp_path / "f", [Curves({"UCB": RUNS, **ruler}, "FID")], xlabel="epoch", log_y=log_y)
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
    curves(tmp_path / "f", [Curves({"a": runs, **ruler}, "y")], xlabel="x", log_y=True)
    ten, hundred = (points(tmp_path / "f.svg", f"fill: none; stroke: {c}")[0][1] for c in (ORANGE, GREEN))
    lowest = max(y for _, y in points(tmp_path / "f.svg", f"fill: {BLUE}; fill-opacity"))  # SVG counts downwards
    assert 10 ** (1 + (lowest - ten) / (hundred - ten)) == pytest.approx(1.0, rel=1e-3)


def words(svg: Path) -> list[str]:
    return [line.strip() for line in re.findall(r"<!--(.*?)-->", svg.read_text())]


def test_the_legend_counts_runs_and_keeps_odd_labels(tmp_path):
    series = {"UCB": RUNS, "_one": RUNS[:1], "$a$ & <b>": RUNS[:2]}
    panel = Curves(series, "FID", floor=12.34, floor_label="real")
    curves(tmp_path / "f.png", [panel], xlabel="epoch", title="Digits")
    drawn = words(tmp_path / "f.svg")
    assert {"UCB (n = 3)", "_one (n = 1)", "mean ± standard deviation", "real (12.3)", "epoch", "FID"} <= {*drawn}
    assert "Digits" in drawn
    assert any("$a$" in text and "(n = 2)" in text for text in drawn)
    curves(tmp_path / "g", [Curves({"one": RUNS[:1]}, "FID")], xlabel="epoch")
    assert "deviation" not in (tmp_path / "g.svg").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.png", "f.svg", "g.png", "g.svg"]


def test_bytes_repeat_whatever_the_program_has_set_and_leave_it_alone(tmp_path):
    def draw(name: str) -> list[bytes]:
        files = curves(tmp_path / name, [Curves({"UCB": RUNS, "b": RUNS[1:]}, "y", floor=9)], xlabel="x")
        images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
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


def test_what_cannot_be_drawn_is_named_and_nothing_written(tmp_path):
    for runs, floor, message in (
        ([(X, ONE), ([0, 10, 20, 31], ONE)], None, "MN: .* different x .4 from 0 to 30 and 4 from 0 to 31"),
        ([(X, X[:3])], None, "MN: expected finite x and y of one length"),
        ([(X, [1, 2, 3, math.nan])], None, "MN: expected finite"),
        ([(X, [1, 2, 3, 0])], None, "MN: expected values above 0"),
        (RUNS, 0.0, "floor: expected a finite positive number, got 0"),
        (RUNS, math.inf, "floor: expected a finite positive number, got inf"),
    ):
        with pytest.raises(ValueError, match=message):
            curves(tmp_path / "f", [Curves({"MN": runs}, "y", floor=floor)], xlabel="x", log_y=True)
    valid = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    for images in (valid.float(), valid[:, :1], valid[:0]):
        with pytest.raises(ValueError, match="images: expected uint8"):
            grid(tmp_path / "g", images)
    assert not list(tmp_path.iterdir())


def test_pictures_are_enlarged_pixel_by_pixel_above_their_captions(tmp_path):
    captions = ["zero", "one", "", "a very long caption indeed", "four"]
    for columns, across, named in ((None, 3, None), (9, 5, None), (2, 2, captions)):
        images = torch.randint(0, 200, (5, 3, 6, 9), generator=generator(0, "grid")).to(torch.uint8)
        grid(tmp_path / "g", images, columns=columns, captions=named)
        drawn = np.asarray(Image.open(tmp_path / "g.png").convert("RGB"))
        factor, rest = divmod(drawn.shape[1], across * 10 + 1)  # nine pixels and one between
        assert rest == 0
        small = drawn[factor // 2 :: factor, factor // 2 :: factor]
        cell = (len(small) - 1) // -(-5 // across)
        if named is None:
            assert cell == 7
            assert np.array_equal(np.kron(small, np.ones((factor, factor, 1))), drawn)
        for i, image in enumerate(images):
            top, left = 1 + i // across * cell, 1 + i % across * 10
            assert np.array_equal(small[top : top + 6, left : left + 9], image.permute(1, 2, 0).numpy())
            below = drawn[(top + 6) * factor : (top + cell - 1) * factor, left * factor : (left + 9) * factor]
            assert bool((below < 128).any()) == bool(named and named[i])


TAG = "metric/fid_classifier"


def make_run(folder: Path, name: str, *, seed: int = 0, norm: str = "kind: ucb", more: str = "", floor: float = 3.0,
             epochs: tuple[int, ...] = (0, 10)) -> str:  # fmt: skip
    path = folder / name
    path.mkdir()
    (path / "config.yaml").write_text(f"seed: {seed}\nnorm: {{{norm}}}\n{more}")
    lines = [{"step": 8 * e, "epoch": e, TAG: 50.0 - e - seed, f"{TAG}_floor": floor, "loss/test": 2.0} for e in epochs]
    lines += [{"step": s, "epoch": 0, "loss/d": 1.0} for s in (3, 6)] + [{"step": 9, "epoch": 1, TAG: None}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "environment.json").write_text('{"sessions": []}')
    (path / "summary.json").write_text('{"protocol": {}, "better": {}}')
    return str(path)


def drawn_lines(capsys, *argv: str) -> list[str]:
    """Draw, and return the names of the lines."""
    common.figures.main([*argv, "--force"])
    return [line.split(": /")[0] for line in capsys.readouterr().out.splitlines()[:-1]]


def test_the_command_joins_runs_that_differ_by_seed_alone(tmp_path, capsys):
    runs = [make_run(tmp_path, name, seed=seed) for name, seed in {"ucb-seed0": 0, "ucb-seed1": 1, "odd": 2}.items()]
    other = make_run(tmp_path, "bn-seed0", norm="kind: bn")
    common.figures.main(["--runs", *runs[:2], other, "--out", f"{tmp_path}/fid"])
    assert capsys.readouterr().out.splitlines() == [
        f"ucb: {runs[0]}, {runs[1]}",
        f"bn: {other}",
        f"written: {tmp_path}/fid.png, {tmp_path}/fid.svg",
    ]
    assert {"ucb (n = 2)", "bn (n = 1)", "real test images (3)", TAG} <= {*words(tmp_path / "fid.svg")}
    common.figures.main(["--runs", *runs, "--out", f"{tmp_path}/all.svg"])
    assert "ucb-seed0, ucb-seed1, odd (n = 3)" in (tmp_path / "all.svg").read_text()


def test_several_values_have_a_panel_each_and_one_legend(tmp_path):
    runs = [make_run(tmp_path, "a"), make_run(tmp_path, "b", seed=1), make_run(tmp_path, "bn", norm="kind: bn")]
    common.figures.main(["--runs", *runs, "--out", f"{tmp_path}/f", "--tag", TAG, "loss/test", "--title", "both"])
    drawn, text = words(tmp_path / "f.svg"), (tmp_path / "f.svg").read_text()
    for name, count in ((TAG, 1), ("loss/test", 1), ("ucb (n = 2)", 1), ("bn (n = 1)", 1), ("both", 1), ("epoch", 2)):
        assert drawn.count(name) == count, name
    assert text.count('<g id="axes_') == 2
    assert "real test images (3)" in drawn
    for colour in (BLUE, ORANGE):
        assert len(re.findall(f"fill: none; stroke: {colour}; stroke-width: 1.8", text)) == 3  # twice, and the legend


def test_the_legend_of_several_panels_stands_below_them_and_the_panels_fill_the_rest(tmp_path, monkeypatch):
    made: list[Figure] = []
    monkeypatch.setattr(figures, "write_figure", lambda figure, path: made.append(figure))
    names = ("ucb", "bn", "mn, groups 1", "scb, statistics batch, num_components 10")
    for count, across in ((2, 2), (3, 3), (4, 2)):
        panels = [Curves({name: [(X, ONE)] for name in names}, "y", floor=2.0)] * count
        curves(tmp_path / "f", panels, xlabel="x", title="both")
        figure = made[-1]
        FigureCanvasAgg(figure).draw()
        (legend,), (width, height) = figure.legends, figure.get_size_inches() * figure.dpi
        box = legend.get_window_extent()
        panes = [axes.get_window_extent() for axes in figure.axes]
        assert len({round(pane.x0) for pane in panes}) == across
        assert min(box.x0, box.y0, width - box.x1) >= 0
        assert box.y1 < min(pane.y0 for pane in panes)
        assert sum(pane.width * pane.height for pane in panes) > 0.45 * width * height


def test_the_legend_names_what_differs_and_does_not_follow_from_the_kind(tmp_path, capsys):
    norms = {"kind: ucb, num_components: 3, groups: null, affine: true": "ucb, norm.groups null",
             "kind: ucb, num_components: 3, groups: 1, affine: true": "ucb, norm.groups 1",
             "kind: bn, num_components: 5, affine: true": "bn",  # it has no components
             "kind: in, affine: false": "in"}  # fmt: skip
    runs = [make_run(tmp_path, f"r{i}", norm=norm, more=f"cache: /{i}\n") for i, norm in enumerate(norms)]
    argv = ["--runs", *runs, "--out", f"{tmp_path}/f"]
    assert drawn_lines(capsys, *argv) == list(norms.values())
    assert drawn_lines(capsys, *argv, "--label", "joint", "1", "BatchNorm", "d") == ["joint", "1", "BatchNorm", "d"]
    assert {"joint (n = 1)", "BatchNorm (n = 1)"} <= {*words(tmp_path / "f.svg")}
    for wrong in (["joint"], ["a", "b", "a", "c"]):
        line = refused(capsys, common.figures.main, *argv, "--force", "--label", *wrong)
        assert f"label: expected 4 different names, for r0; r1; r2; r3; got {', '.join(wrong)}" in line
    plain = make_run(tmp_path, "plain", norm="kind: bn, affine: false")
    found = drawn_lines(capsys, "--runs", *runs[::3], plain, "--out", f"{tmp_path}/f")
    assert found[2] == "bn, norm.affine false"
    places = [make_run(tmp_path, name, norm="kind: bn", more=f"device: {name}\n") for name in ("cpu", "cuda")]
    assert drawn_lines(capsys, "--runs", *places, "--out", f"{tmp_path}/f") == ["device cpu", "device cuda"]


def test_unlike_runs_are_refused_as_tables_do(tmp_path, capsys):
    runs = [make_run(tmp_path, "a"), make_run(tmp_path, "b", norm="kind: bn", floor=4.0)]
    argv = ["--runs", *runs, "--out", f"{tmp_path}/f"]
    assert f"{TAG}_floor is 3 in {runs[0]} and 4 in {runs[1]}" in refused(capsys, common.figures.main, *argv)
    assert not list(tmp_path.glob("f.*"))
    common.figures.main([*argv, "--tag", "loss/d", "--x", "step"])  # which does not depend on it


def test_bad_input_is_one_line(tmp_path, capsys):
    run, longer = make_run(tmp_path, "a-seed0"), make_run(tmp_path, "a-seed1", seed=1, epochs=(0, 10, 20))
    out = ["--out", f"{tmp_path}/f"]
    (tmp_path / "file").write_text("")
    for argv, line in (
        (out, "runs: name at least one"),
        (["--runs", *out], "argument --runs: expected at least one argument"),
        (["--runs", run], "out: expected the figure's path"),
        (["--runs", run, "--out", f"{tmp_path}/.png"], "out: expected the figure's path"),
        (["--runs", f"{tmp_path}", *out], "is not a run's folder"),
        (["--runs", "~/ghost", *out], f"{Path.home()}/ghost is not a run's folder"),
        (["--runs", run, "--tag", "loss/g", *out], "has no loss/g; it has loss/d, loss/test, metric/fid"),
        (["--runs", run, *out, "--tag"], "tag: "),
        (["--runs", run, "--tag", "loss/d", *out], "use --x step"),
        (["--runs", run, run, *out], "same settings and seed"),
        (["--runs", run, longer, *out], "a: its runs have different x"),
        (["--runs", run, "--out", f"{tmp_path}/file/f"], "out: cannot write"),
    ):
        assert line in refused(capsys, common.figures.main, *argv)
    for name, text, line in (
        ("metrics.jsonl", f'{{"step": 1, "epoch": 1, "{TAG}": null}}\n', f"{TAG} is not finite anywhere in {run}"),
        ("config.yaml", "a: [", f"runs: {run} cannot be read"),
        ("config.yaml", "- 1", f"runs: {run} cannot be read"),
        ("metrics.jsonl", "7\n", f"runs: {run} cannot be read"),
        ("metrics.jsonl", f'{{"epoch": 1, "{TAG}": "low"}}\n', f"runs: {run} cannot be read"),
        ("environment.json", "[]", f"runs: {run} cannot be read"),
        ("summary.json", "[]", f"runs: {run} cannot be read"),
    ):
        before = Path(run, name).read_text()
        Path(run, name).write_text(text)
        assert line in refused(capsys, common.figures.main, "--runs", run, *out)
        Path(run, name).write_text(before)
    assert not list(tmp_path.glob("f.*"))


def test_an_existing_figure_is_replaced_only_by_force(tmp_path, capsys):
    run = make_run(tmp_path, "a-seed0")
    (tmp_path / "f.svg").write_text("mine")
    argv = ["--runs", run, "--out", f"{tmp_path}/f"]
    assert f"out: {tmp_path}/f.svg exists; add --force" in refused(capsys, common.figures.main, *argv)
    assert (tmp_path / "f.svg").read_text() == "mine"
    assert not (tmp_path / "f.png").exists()
    common.figures.main([*argv, "--force", "--tag", "loss/d", "--x", "step"])
    assert "loss/d" in (tmp_path / "f.svg").read_text()
