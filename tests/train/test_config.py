from dataclasses import replace

import pytest
import torch
import yaml

from cbcls.config import ClassifierConfig
from cbda.config import AdaMatchConfig
from cbgan.config import GanConfig
from common.norms.config import NormConfig
from common.runtime.cli import parse
from common.runtime.errors import UsageError
from common.runtime.fields import changeable
from common.train.config import RunConfig, ScheduleConfig, resume_config, stored_yaml


def test_a_stored_configuration_of_another_form_is_one_line_that_names_it(tmp_path):
    for text in ("", "epochs: [", "log_every: x", "log_every: 0", "foo: 1", "{}\n---\n{}"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UsageError, match=rf"^config: {tmp_path}/config\.yaml: ") as caught:
            resume_config(RunConfig, ["--name", "run", "--resume"], tmp_path)
        assert "\n" not in str(caught.value)
        assert str(caught.value).count("config.yaml") == 1


def test_a_resumed_run_keeps_its_settings_but_for_those_that_may_change(tmp_path):
    stored = RunConfig(seed=3, log_every=7, name="old", out=tmp_path, cache=tmp_path / "cache")
    (tmp_path / "config.yaml").write_text(stored_yaml(stored))
    assert not {"name", "out", "resume", "dry_run"} & set(yaml.safe_load((tmp_path / "config.yaml").read_text()))
    argv = ["--name", "run", "--resume", "--out", str(tmp_path / "elsewhere")]
    now = replace(stored, name="run", resume=True, out=tmp_path / "elsewhere")
    assert resume_config(RunConfig, argv, tmp_path) == now
    assert resume_config(RunConfig, [*argv, "--log_every", "9"], tmp_path).log_every == 9
    assert resume_config(RunConfig, [*argv, "--seed", "3"], tmp_path).seed == 3
    with pytest.raises(UsageError, match=r"^seed: the run has 3, got 4; .*free to change: cache, .*threads\)$"):
        resume_config(RunConfig, [*argv, "--seed", "4"], tmp_path)


def test_a_run_whose_schedule_ends_with_it_is_not_prolonged_and_one_of_constant_rate_is(tmp_path):
    argv = ["--name", "run", "--resume", "--epochs", "4"]
    for kind in ("cosine", "constant"):
        (tmp_path / "config.yaml").write_text(stored_yaml(RunConfig(epochs=2, schedule=ScheduleConfig(kind=kind))))
        if kind == "constant":
            assert resume_config(RunConfig, argv, tmp_path).epochs == 4
            continue
        with pytest.raises(
            UsageError, match=r"^epochs: the run has 2, which its schedule .* got 4; .*--init_from.*--sch"
        ):
            resume_config(RunConfig, argv, tmp_path)
    (tmp_path / "summary.json").write_text('{"epochs": {"done": 5, "wanted": 6}}')
    with pytest.raises(UsageError, match=r"^epochs: expected at least the 5 that the run has done, got 4$"):
        resume_config(RunConfig, argv, tmp_path)


def test_an_adaptation_of_any_length_has_no_warm_up_either(tmp_path):
    (tmp_path / "config.yaml").write_text(stored_yaml(AdaMatchConfig(epochs=2)))
    argv = ["--name", "run", "--resume", "--epochs", "4"]
    with pytest.raises(UsageError, match=r"or begin with --schedule\.kind constant --method\.warmup 0$"):
        resume_config(AdaMatchConfig, argv, tmp_path)
    assert not parse(AdaMatchConfig, AdaMatchConfig.of_any_length.split()).follows_length


PLACES = {"root", "test_root", "download"}
MORE = {
    RunConfig: set(),
    GanConfig: {f"data.{name}" for name in (*PLACES, "in_memory", "workers")},
    ClassifierConfig: {f"data.{name}" for name in (*PLACES, "in_memory", "workers")} | {"clusters.file"},
    AdaMatchConfig: {f"{domain}.{name}" for domain in ("source", "target") for name in PLACES} | {"data.workers"},
}


def test_for_how_long_how_often_and_where_may_change_and_nothing_else():
    always = {"epochs", "log_every", "checkpoint_every", "checkpoint_keep", "device", "threads", "cache"}
    for kind, more in MORE.items():
        assert changeable(kind) == always | more


LAYOUTS = [
    # flags, whether there is a GPU, whether images are kept as NHWC
    ([], False, True),
    ([], True, False),
    (["--device", "cpu"], True, True),
    (["--device", "cuda:1"], False, False),
    (["--channels_last", "false"], False, False),
    (["--channels_last"], True, True),
]


def test_a_cpu_keeps_images_as_nhwc_and_a_run_that_goes_on_keeps_what_it_had(tmp_path, monkeypatch):
    argv = ["--name", "run", "--resume"]
    for flags, gpu, last in LAYOUTS:
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        (tmp_path / "config.yaml").write_text(stored_yaml(parse(RunConfig, flags).resolved()))
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: not gpu)  # on another machine
        assert resume_config(RunConfig, argv, tmp_path).resolved().channels_last is last
    with pytest.raises(UsageError, match=r"^channels_last: the run has true, got false"):
        resume_config(RunConfig, [*argv, "--channels_last", "false"], tmp_path)


def test_networks_that_nhwc_slows_down_stay_as_they_are():
    slow = {AdaMatchConfig: ["--model.name", "timm:resnet18"], ClassifierConfig: ["--model.name", "timm:resnet18"],
            GanConfig: ["--width", "256"]}  # fmt: skip
    for kind, flags in slow.items():
        assert parse(kind, ["--device", "cpu"]).resolved().channels_last
        assert not parse(kind, ["--device", "cpu", *flags]).resolved().channels_last
        assert parse(kind, ["--device", "cpu", *flags, "--channels_last"]).resolved().channels_last


def test_a_change_that_may_not_be_is_named_whatever_it_makes_of_other_settings(tmp_path):
    stored = RunConfig(norm=NormConfig(kind="ucb")).resolved()  # norm.update and others are written out, bn has none
    (tmp_path / "config.yaml").write_text(stored_yaml(stored))
    argv = ["--name", "run", "--resume"]
    with pytest.raises(UsageError, match=r"^norm\.kind: the run has ucb, got bn; leave it out, .* --name.*threads\)$"):
        resume_config(RunConfig, [*argv, "--norm.kind", "bn"], tmp_path)
    with pytest.raises(UsageError, match=r"^norm\.groups: the run has null, got 1; "):
        resume_config(RunConfig, [*argv, "--norm.groups", "1"], tmp_path)
    with pytest.raises(UsageError, match=r"^log_every: expected at least 1, got 0$"):  # may change, but not to this
        resume_config(RunConfig, [*argv, "--log_every", "0"], tmp_path)
