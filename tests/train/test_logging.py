import errno
import json
import os

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.train.logging import Log, Means, chart_name, listed, read_metrics


def test_the_same_names_and_values_in_both_places(tmp_path):
    log = Log(tmp_path)
    log.scalars(10, 1, {"loss/d": 0.5, "metric/fid_classifier": 12.25})
    log.scalars(20, 2, {"loss/d": 0.25})
    log.close()
    assert read_metrics(tmp_path)[0] == {
        "step": 10,
        "epoch": 1,
        "loss/d": 0.5,
        "metric/fid_classifier": 12.25,
    }
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("2_loss/d")] == [(10, 0.5), (20, 0.25)]
    assert [(e.step, e.value) for e in events.Scalars("0_headline/fid_classifier")] == [(10, 12.25)]


def test_a_resumed_log_is_cut_back_to_its_checkpoint(tmp_path):
    log = Log(tmp_path)
    log.scalars(10, 1, {"loss/d": 1.0})
    position = log.sync()
    log.scalars(20, 2, {"loss/d": 2.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "ep')  # the crash came in mid-line
    again = Log(tmp_path, 10, position)
    again.scalars(20, 2, {"loss/d": 3.0})
    again.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss/d"] for line in lines] == [1.0, 3.0]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("2_loss/d")] == [(10, 1.0), (20, 3.0)]


def test_what_is_not_finite_stays_valid_json(tmp_path):
    log = Log(tmp_path)
    log.scalars(1, 1, {"loss/d": float("nan")})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=None)["loss/d"] is None


def test_a_name_is_averaged_over_the_steps_that_had_it_across_a_restart():
    means = Means()
    for step in ({"a": 1.0, "b": 5.0}, {"a": 3.0}, {"a": 8.0, "c": 2.0}):
        before, means = means, Means()
        means.load_state_dict(before.state_dict())
        means.add({name: torch.tensor(value) for name, value in step.items()})
    assert means.pop() == {"a": 4.0, "b": 5.0, "c": 2.0}
    assert means.pop() == {}


def test_values_are_listed_by_their_last_names_and_those_that_are_none_left_out():
    values = {"metric/accuracy": 0.9349, "health/norm1/usage_min": 12345.0, "loss/d": None}
    assert listed(values) == "accuracy 0.935, usage min 1.23e+04"


def test_charts_sort_as_they_are_read():
    names = {
        "metric/accuracy": "0_headline/accuracy",
        "metric/error": "1_result/error",
        "loss/d": "2_loss/d",
        "schedule/lr": "6_schedule/lr",
        "health/norm1/usage_min": "9_health/norm1/usage_min",
        "other/x": "other/x",
        "loss": "loss",
        "adapt/mask_rate": "2_adaptation/mask_rate",
        "adapt/ratio/cat": "4_alignment/cat",
        "schedule/mu": "2_adaptation/mu",
        "metric/target_accuracy_as_source": "8_by_cluster/target_accuracy_as_source",
        "metric/target_weighted_f1": "4_averages/target_weighted_f1",
        "metric/target_weighted_f1_as_source": "8_by_cluster/target_weighted_f1_as_source",
        "metric/fid_x": "0_headline/fid_x",
        "metric/fid_x_floor": "1_result/fid_x_floor",
        "metric/fid_x_low": "4_quality/fid_x_low",
        "metric/fid_x_final": "1_result/fid_x_final",
        "metric/fid_x_low_final": "4_quality/fid_x_low_final",
        "metric/precision_x_final": "4_quality/precision_x_final",
        "metric/macro_recall": "1_result/macro_recall",
    }
    assert {tag: chart_name(tag) for tag in names} == names
    story = [chart_name(f"{group}/x") for group in ("metric", "loss", "gradient", "schedule", "time", "health")]
    assert story == sorted(story)


def test_pages_of_settings_charts_and_pictures(tmp_path):
    settings = {"lr": 0.5, "norm.kind": "ucb", "flip": True, "grad_clip_norm": None}
    log = Log(tmp_path, settings=settings, results=["metric/accuracy"])
    band = ("metric/fid_x", "metric/fid_x_low", "metric/fid_x_high")
    log.charts({"FID": ["metric/fid_x", "metric/fid_x_floor"]}, {"Interval": band})
    picture = torch.arange(3 * 4 * 5).reshape(3, 4, 5).to(torch.uint8)
    log.image(7, "samples/generated", picture)
    log.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.split("\n") == [f"    {name}: {value}" for name, value in settings.items()]
    from tensorboard.plugins.custom_scalar import layout_pb2  # noqa: PLC0415 - heavy
    from tensorboard.plugins.hparams import plugin_data_pb2  # noqa: PLC0415 - heavy

    (text,) = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val
    layout = layout_pb2.Layout.FromString(text)  # pyright: ignore[reportAttributeAccessIssue]
    assert [category.title for category in layout.category] == ["FID", "Interval"]
    (chart,), (other,) = (category.chart for category in layout.category)
    assert (chart.title, other.title) == ("FID", "Interval")
    assert list(chart.multiline.tag) == ["0_headline/fid_x$", "1_result/fid_x_floor$"]
    (series,) = other.margin.series
    assert (series.value, series.lower, series.upper) == tuple(map(chart_name, band))
    read = {}
    for name in ("experiment", "session_start_info"):
        content = events.summary_metadata[f"_hparams_/{name}"].plugin_data.content
        read[name] = plugin_data_pb2.HParamsPluginData.FromString(content)  # pyright: ignore[reportAttributeAccessIssue]
    started = read["session_start_info"].session_start_info.hparams
    assert started["lr"].number_value == 0.5
    assert [started[name].string_value for name in ("norm.kind", "grad_clip_norm")] == ["ucb", "None"]
    (metric,) = read["experiment"].experiment.metric_infos
    assert metric.name.tag == "0_headline/accuracy"
    (image,) = events.Images("3_samples/generated")
    assert (image.step, image.width, image.height) == (7, 5, 4)


def test_a_rank_that_writes_nothing_takes_everything(tmp_path):
    log = Log(tmp_path, active=False, settings={"lr": 1})
    log.scalars(1, 1, {"loss/d": 1.0})
    log.charts({"FID": ["loss/d"]})
    log.image(1, "samples/x", torch.zeros(3, 2, 2, dtype=torch.uint8))
    assert log.sync() == 0
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_the_position_is_the_length_of_what_was_written(tmp_path):
    log = Log(tmp_path)
    log.scalars(1, 1, {"loss/d": 1.0})
    assert log.sync() == (tmp_path / "metrics.jsonl").stat().st_size == len('{"step": 1, "epoch": 1, "loss/d": 1.0}\n')
    log.close()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    assert read_metrics(tmp_path) == [{"step": 1}]  # what follows a broken line belongs to no run


def test_a_full_disk_is_named_with_the_file_that_met_it(tmp_path, monkeypatch):
    log = Log(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for owner, name, act, place in (
        (os, "fsync", log.sync, tmp_path / "metrics.jsonl"),
        (log._events, "close", log.close, tmp_path),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(OSError, match="No space left") as found:
                act()
        assert found.value.filename == str(place)
    log._events.close()
    assert log._file.closed
