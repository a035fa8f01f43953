from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from common.cli.arguments import flatten, parse, to_dict, to_yaml
from common.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A group."""

    kind: Literal["bn", "ucb"] = "ucb"
    """Which layer."""
    k: int = 3
    """How many."""
    groups: int | None = None
    """How many share."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"norm.k: expected at least 1, got {self.k}")


@dataclass(frozen=True, kw_only=True)
class Outer:
    """A configuration."""

    epochs: int = 5
    """Passes over the data."""
    lr: float = 2e-4
    """Step size."""
    root: Path | None = None
    """Where images are."""
    resume: bool = False
    """Go on."""
    norm: Inner = field(default_factory=Inner)


def test_defaults_then_files_in_order_then_flags(tmp_path):
    (tmp_path / "a.yaml").write_text("epochs: 7\nlr: 1e-3\nnorm: {kind: bn, groups: 4}\n")
    (tmp_path / "b.yaml").write_text("epochs: 8\nnorm: {k: 5}\n")
    files = ["--config", f"{tmp_path}/a.yaml", "--config", f"{tmp_path}/b.yaml"]
    expected = Outer(epochs=9, lr=1e-3, resume=True, norm=Inner(kind="bn", k=5, groups=4))
    assert parse(Outer, [*files, "--epochs", "9", "--resume"]) == expected
    assert parse(Outer, files).epochs == 8
    assert parse(Outer, ["--epochs", "9", *files]).epochs == 8  # the later wins, whatever its form
    assert parse(Outer, [*files, "--resume", "false"]) == parse(Outer, files)


def test_a_configuration_survives_its_yaml(tmp_path):
    config = Outer(epochs=2, root=Path("some/folder"), norm=Inner(groups=2))
    (tmp_path / "c.yaml").write_text(to_yaml(to_dict(config)))
    assert parse(Outer, ["--config", f"{tmp_path}/c.yaml"]) == config
    assert dict(flatten(to_dict(config)))["norm.groups"] == 2


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert parse(Outer, ["--root", "~/images"]).root == Path("/home/somebody/images")
    with pytest.raises(UsageError, match=r"^root: expected a path, got ~nobody_9/images, and there is no such user$"):
        parse(Outer, ["--root", "~nobody_9/images"])
    with pytest.raises(UsageError, match=r"^config: expected a path, got ~nobody_9/a.yaml, and there is no such user$"):
        parse(Outer, ["--config", "~nobody_9/a.yaml"])


BAD_FLAGS = {
    "--epochs x": ["epochs", "whole number", "x"],
    "--epochs 2.5": ["epochs", "whole number", "2.5"],
    "--lr fast": ["lr", "a number", "fast"],
    "--norm.kind foo": ["norm.kind", "bn, ucb", "foo"],
    "--norm.k 0": ["norm.k", "at least 1", "0"],
    "--norm.groups x": ["norm.groups", "whole number or null", "x"],
    "--norm 3": ["norm", "3"],
    "--nork.kind bn": ["--nork.kind", "did you mean --norm.kind"],
    "--epoch 3": ["--epoch", "did you mean --epochs"],
    "--resume=maybe": ["resume", "true or false", "maybe"],
    "--epochs": ["epochs", "value is missing"],
    "extra": ["extra", "no such option"],
    "--config nowhere.yaml": ["config", "no file", "nowhere.yaml"],
    "--config /": ["config", "/ is a folder"],
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_bad_flag_is_one_line_that_names_field_value_and_what_is_right(flags):
    with pytest.raises(UsageError) as caught:
        parse(Outer, flags.split())
    line = str(caught.value)
    assert "\n" not in line
    assert "Parser key" not in line
    for part in BAD_FLAGS[flags]:
        assert part in line, line


@dataclass(frozen=True, kw_only=True)
class Training(Outer):
    """A configuration with names that are easily mixed up."""

    name: str | None = None
    """The run's."""
    seed: int = 0
    """Of all draws."""
    best: bool = False
    """Keep it."""
    batch_size: int = 2
    """Images a step."""
    schedule: Inner = field(default_factory=Inner)


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """What reads a run."""

    run: Path | None = None
    """Its folder."""


HINTS = {  # what was typed, and all that may be suggested: only what is near
    "--bs 4": "did you mean --batch_size?",  # by its initials; neither --best nor --seed
    "--batch 4": "did you mean --batch_size?",
    "--batch-size 4": "did you mean --batch_size?",
    "--sede 1": "did you mean --seed?",
    "--nmae x": "did you mean --name?",
    "--kind bn": "did you mean --norm.kind or --schedule.kind?",
    "--norm_kind bn": "did you mean --norm.kind?",
    "--norm.kin bn": "did you mean --norm.kind?",
    "--norm.foo 1": "see --help",  # shares its group alone with --norm.kind
    "--ls 1": "see --help",
    "--x 1": "see --help",
    "runs/cbgan/first": "did you mean --name first --resume?",
    "/disk/runs/cbgan/first": "did you mean --name first --resume --out /disk/runs?",
    "bn.yaml": "did you mean --config bn.yaml?",
    "first": "see --help",
}


@pytest.mark.parametrize("flags", HINTS)
def test_only_what_is_near_is_suggested(flags):
    with pytest.raises(UsageError) as caught:
        parse(Training, flags.split())
    assert str(caught.value) == f"{flags.split()[0]}: no such option; {HINTS[flags]}"


def test_a_run_given_without_an_option_is_told_the_option():
    with pytest.raises(UsageError, match=r"^runs/cbgan/first: no such option; did you mean --run runs/cbgan/first\?$"):
        parse(Measuring, ["runs/cbgan/first"])
    with pytest.raises(UsageError, match=r"^--bs: no such option; see --help$"):
        parse(Measuring, ["--bs", "3"])
    with pytest.raises(UsageError, match=r"^--epochs\.x: no such option; see --help$"):
        parse(Training, ["--epochs.x", "3"])


BAD_FILES = {
    "epochs: abc": ["epochs", "whole number", "abc"],
    "epochs: null": ["epochs", "whole number", "null"],
    "epochs: [1, 2]": ["epochs", "whole number", "[1, 2]"],
    "epochs: [1": ["bad.yaml"],
    "epochs: !!python/object:os.system x": ["bad.yaml"],
    "a: &x [*x]": ["config"],
    "norm: 3": ["norm", "group of settings", "3"],
    "norm: null": ["norm", "group of settings", "null"],
    "norm: {foo: 1}": ["norm.foo", "no such setting"],
    "nrom: {}": ["nrom", "did you mean norm"],
    "epohcs: 3": ["epohcs", "did you mean epochs"],
    "root: 5": ["root", "path or null", "5"],
    "1: 2": ["bad.yaml"],
    "- 1": ["bad.yaml", "name: value"],
    "hello": ["bad.yaml", "hello"],
    "": ["bad.yaml", "empty"],
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_file_is_one_line_too(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        parse(Outer, ["--config", f"{tmp_path}/bad.yaml"])
    line = str(caught.value)
    assert "\n" not in line
    for part in BAD_FILES[text]:
        assert part in line, line


def test_a_file_that_is_not_text_is_one_line(tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(UsageError, match=r"bad\.yaml.*cannot be read"):
        parse(Outer, ["--config", f"{tmp_path}/bad.yaml"])


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(Outer, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "Passes over the data.",
        "Step size.",
        "Where images are.",
        "Which layer.",
        "How many share.",
    ):
        assert words in text


def test_print_config_prints_yaml_that_gives_the_same_configuration(capsys, tmp_path):
    with pytest.raises(SystemExit, match="0"):
        parse(Outer, ["--epochs", "9", "--norm.kind", "bn", "--print_config"])
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["norm"]["kind"] == "bn"
    (tmp_path / "printed.yaml").write_text(text)
    assert parse(Outer, ["--config", f"{tmp_path}/printed.yaml"]) == Outer(epochs=9, norm=Inner(kind="bn"))
