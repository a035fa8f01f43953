"""Bad input is one line that names the field, the value and what would be right; nothing is written."""

from domains import write_domain
from refusals import refused

import cbda.adamatch

FLAGS = {
    "--norm.kind foo": ["norm.kind", "foo", "scb"],
    "--norm.num_components 3": ["norm.num_components", "expected 2", "domains", "3"],
    "--norm.average em": ["norm.average", "em", "scb"],  # a setting of ucb
    "--norm.kind ucb --norm.groups 2": ["groups", "2", "3"],
    "--norm.kind bn --model.convert all": ["model.convert", "bn"],
    "--model.convert nowhere": ["model.convert", "nowhere"],
    "--model.name resnet": ["model.name", "wrn-DEPTH-WIDTH", "resnet"],
    "--model.name wrn-11-1": ["model.name", "6 n + 4", "wrn-11-1"],
    "--model.name timm:nosuchnet": ["model.name", "nosuchnet"],
    "--model.pretrained": ["model.pretrained", "timm:", "wrn-10-1"],
    "--model.momentum 0": ["model.momentum", "more than 0"],
    "--method.kind foo": ["method.kind", "foo", "official"],
    "--method.tau 0": ["method.tau", "more than 0"],
    "--method.warmup 2": ["method.warmup", "0 to 1", "2"],
    "--method.decay 1": ["method.decay", "1"],
    "--method.history 0": ["method.history", "at least 1", "0"],
    "--method.align_by labelled": ["method.align_by", "target.labels_per_class"],
    "--noise_every -1": ["noise_every", "0 or more", "-1"],
    "--noise_every 5 --batch_size 7": ["noise_every", "batch_size of at least 8", "5 for 7"],
    "--target_ratio 0": ["target_ratio", "at least 1", "0"],
    "--batch_size 50": ["batch_size", "36", "target", "50"],
    "--target_ratio 5": ["batch_size", "36", "target", "45"],
    "--source.labels_per_class 0": ["source.labels_per_class", "at least 1", "0"],
    "--source.labels_per_class 50": ["source.labels_per_class", "12", "class cat", "50"],
    "--target.labels_per_class 50": ["target.labels_per_class", "12", "class cat", "50"],
    "--source.name foo": ["source.name", "foo", "digits"],
    "--target.name digits": ["target.root", "digits"],
    "--target.test_root nowhere": ["target.test_root", "nowhere"],
    "--best.keep --best.by metric/target_accuracy": ["best.by", "target_test", "--best.allow_test_metric"],
    "--name x --init_from nowhere.pt": ["init_from", "nowhere.pt"],
}
"""Of this application; what all runs refuse is tested in tests/train, tests/data and tests/norms."""


def test_bad_flags_are_one_line_each_and_nothing_is_written(tiny, tmp_path, capsys):
    for flags, parts in FLAGS.items():
        line = refused(capsys, cbda.adamatch.main, *tiny, *flags.split())
        assert all(part in line for part in parts), line
    assert list(tmp_path.iterdir()) == []


def test_domains_that_do_not_go_together(tiny, tmp_path, domains, capsys):
    def refuses(*flags: str) -> str:
        return refused(capsys, cbda.adamatch.main, *tiny, *flags)

    bare = str(domains / "target" / "bare")
    other = write_domain(tmp_path / "other", 50, classes=("cat", "dog", "owl"))
    line = refuses("--target.root", str(other), "--target.test_root", "null")
    assert line.startswith(
        "error: target.name: other has classes that the source has not (owl); expected some of cat, dog, fox"
    )
    assert "source.root: bare has no labels" in refuses("--source.root", bare, "--source.test_root", "null")
    no_labels = ("--target.root", bare, "--target.test_root", "null")
    for domain in ("source", "target"):
        line = refuses(f"--{domain}.test_root", bare)
        assert line.startswith(f"error: {domain}.test_root: bare has no labels; test images need one sub-folder")
    assert "target.labels_per_class: expected null, since bare has no labels, got 1" in refuses(
        *no_labels, "--target.labels_per_class", "1"
    )
    by_accuracy = ("--best.keep", "--best.by", "metric/target_accuracy", "--best.allow_test_metric")
    assert "best.by: metric/target_accuracy needs labels" in refuses(*no_labels, *by_accuracy)
    (tmp_path / "empty").mkdir()
    assert "target.root: no images in" in refuses("--target.root", str(tmp_path / "empty"))
    one = write_domain(tmp_path / "one", 50, classes=("cat",))
    assert "source.root: expected at least 2 classes" in refuses(
        "--source.root", str(one), "--source.test_root", "null"
    )
    assert not (tmp_path / "cbda").exists()
