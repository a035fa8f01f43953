from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from common.runtime.cli import flatten, parse, to_dict, to_yaml
from common.runtime.errors import UsageError


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
    weights: list[str] = field(default_factory=list)
    """Of which files."""
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


def refused(cls: type, *argv: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse(cls, argv)
    line = str(caught.value)
    assert line.isprintable()
    assert "<class" not in line  # types by their names alone
    return line


BAD_FLAGS = {
    "--epochs x": ["epochs", "int", "x"],
    "--epochs 2.5": ["epochs", "int", "2.5"],
    "--lr fast": ["lr", "float", "fast"],
    "--norm.kind foo": ["norm.kind", "bn", "ucb", "foo"],
    "--norm.k 0": ["norm.k", "at least 1", "0"],
    "--norm.groups x": ["norm.groups", "int", "x"],
    "--norm 3": ["norm", "3"],
    "--norm null": ["norm", "null"],
    "--norm {foo:1}": ["norm", "foo"],
    "--resume=maybe": ["resume", "bool", "maybe"],
    "--resume !!bool": ["tag", "!!bool"],
    "--epochs": ["epochs", "expected one argument"],
    "extra": ["extra", "no such option"],
    "--config nowhere.yaml": ["config", "nowhere.yaml"],
    "--config /": ["config", "'/'"],
}


def test_a_bad_flag_is_one_line_that_names_field_and_value():
    for flags, parts in BAD_FLAGS.items():
        line = refused(Outer, *flags.split())
        assert "class" not in line
        for part in parts:
            assert part in line, (flags, line)


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
    grad_clip_norm: float = 1.0
    """Of all gradients."""
    schedule: Inner = field(default_factory=Inner)


HINTS = {  # what was typed, and all that may be suggested: only what is near
    "--epoch 3": "did you mean --epochs?",
    "--batch 4": "did you mean --batch_size?",
    "--clip 1": "did you mean --grad_clip_norm?",
    "--batch-size=4": "did you mean --batch_size?",
    "--sede 1": "did you mean --seed?",
    "--nmae x": "did you mean --name?",
    "--kind bn": "did you mean --norm.kind or --schedule.kind?",
    "--norm_kind bn": "did you mean --norm.kind?",
    "--norm.kin bn": "did you mean --norm.kind?",
    "--norm.foo 1": "see --help",  # shares its group alone with --norm.kind
    "--bs 1": "see --help",
    "--x 1": "see --help",
    "runs/cbgan/first": "see --help",
}


def test_only_what_is_near_is_suggested():
    for flags, hint in HINTS.items():
        name = flags.split()[0].split("=")[0]
        assert refused(Training, *flags.split()) == f"{name}: no such option; {hint}"


BAD_FILES = {
    "epochs: abc": ["bad.yaml", "epochs", "int", "abc"],
    'epochs: "a\\e[31m\\nb"': ["bad.yaml", "epochs", r"a\x1b[31m"],
    "epochs: null": ["epochs", "int", "null"],
    "epochs: [1, 2]": ["bad.yaml", "epochs", "int", "[1, 2]"],
    "epochs: [1": ["bad.yaml", "cannot be read as YAML"],
    "epochs: !!python/object:os.system x": ["bad.yaml", "cannot be read as YAML"],
    "resume: !!bool maybe": ["bad.yaml", "tag", "'maybe'"],
    "epochs: &x [*x]": ["epochs"],
    "norm: &x {norm: *x}": ["bad.yaml", "norm.norm"],
    "weights: {}": ["weights", "list[str]", "{}"],
    "norm: 3": ["norm", "group of settings", "3"],
    "norm: null": ["norm", "group of settings", "null"],
    "norm: {foo: 1}": ["bad.yaml", "norm.foo", "no such setting"],
    "nrom: {}": ["bad.yaml", "nrom", "did you mean norm?"],
    "epohcs: 3": ["bad.yaml", "epohcs", "did you mean epochs?"],
    "root: 5": ["bad.yaml", "root", "5"],
    "1: 2": ["bad.yaml", "1: no such setting"],
    "- 1": ["bad.yaml", "name: value", "[1]"],
    "hello": ["bad.yaml", "name: value", "hello"],
    "": ["bad.yaml", "name: value", "null"],
}


def test_a_bad_file_is_one_line_that_names_it_too(tmp_path):
    for text, parts in BAD_FILES.items():
        (tmp_path / "bad.yaml").write_text(text)
        line = refused(Outer, "--config", f"{tmp_path}/bad.yaml")
        for part in parts:
            assert part in line, (text, line)


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
