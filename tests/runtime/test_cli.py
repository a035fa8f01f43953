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
    assert "\n" not in line
    assert "<class" not in line  # types by their names alone
    return line


BAD_FLAGS = {
    "--epochs 2.5": ["epochs", "int", "2.5"],
    "--norm.kind foo": ["norm.kind", "bn", "ucb", "foo"],
    "--norm.k 0": ["norm.k", "at least 1", "0"],
    "--norm.groups x": ["norm.groups", "int", "x"],
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
        for part in parts:
            assert part in line, (flags, line)


@dataclass(frozen=True, kw_only=True)
class Training(Outer):
    """A configuration with names that are easily mixed up."""

    name: str | None = None
    """The run's."""
    batch_size: int = 2
    """Images a step."""
    schedule: Inner = field(default_factory=Inner)


HINTS = {
    "--epoch": "did you mean --epochs?",
    "--batch": "did you mean --batch_size?",
    "--batch-size=4": "did you mean --batch_size?",
    "--nmae": "did you mean --name?",
    "--kind": "did you mean --norm.kind or --schedule.kind?",
    "--norm_kind": "did you mean --norm.kind?",
    "--norm.foo": "see --help",  # shares its group alone with --norm.kind
    "--bs": "see --help",
    "runs/cbgan/first": "see --help",
}


def test_only_what_is_near_is_suggested():
    for flag, hint in HINTS.items():
        assert refused(Training, flag) == f"{flag.split('=')[0]}: no such option; {hint}"


BAD_FILES = {
    b"epochs: abc": ["bad.yaml", "epochs", "int", "abc"],
    b"epochs: null": ["epochs", "int", "null"],
    b"epochs: [1": ["bad.yaml", "cannot be read as YAML"],
    b"epochs: !!python/object:os.system x": ["bad.yaml", "cannot be read as YAML"],
    b"resume: !!bool maybe": ["bad.yaml", "tag", "'maybe'"],
    b"epochs: &x [*x]": ["epochs"],
    b"norm: &x {norm: *x}": ["bad.yaml", "norm.norm"],
    b"weights: {}": ["weights", "list[str]", "{}"],
    b"norm: 3": ["norm", "group of settings", "3"],
    b"norm: {foo: 1}": ["bad.yaml", "norm.foo", "no such setting"],
    b"nrom: {}": ["bad.yaml", "nrom", "did you mean --norm?"],
    b"root: 5": ["bad.yaml", "root", "5"],
    b"1: 2": ["bad.yaml", "1: no such setting"],
    b"- 1": ["bad.yaml", "name: value", "[1]"],
    b"": ["bad.yaml", "name: value", "null"],
    b"\xff\xfe\x00bad": ["bad.yaml", "cannot be read"],
}


def test_a_bad_file_is_one_line_that_names_it_too(tmp_path):
    for text, parts in BAD_FILES.items():
        (tmp_path / "bad.yaml").write_bytes(text)
        line = refused(Outer, "--config", f"{tmp_path}/bad.yaml")
        for part in parts:
            assert part in line, (text, line)


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(Outer, ["--help"])
    text = capsys.readouterr().out
    for words in ("Passes over the data.", "Step size.", "Where images are.", "Which layer.", "How many share."):
        assert words in text


def test_print_config_prints_yaml_that_gives_the_same_configuration(capsys, tmp_path):
    with pytest.raises(SystemExit, match="0"):
        parse(Outer, ["--epochs", "9", "--norm.kind", "bn", "--print_config"])
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["norm"]["kind"] == "bn"
    (tmp_path / "printed.yaml").write_text(text)
    assert parse(Outer, ["--config", f"{tmp_path}/printed.yaml"]) == Outer(epochs=9, norm=Inner(kind="bn"))
