import json

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.runs.log import Log, Means, read_metrics


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
    assert [(e.step, e.value) for e in events.Scalars("1_result/fid_classifier")] == [(10, 12.25)]


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


def test_means_go_on_after_their_state_was_restored():
    whole, parts = Means(), Means()
    values = [torch.tensor(v) for v in (1.0, 2.0, 6.0)]
    for value in values:
        whole.add({"loss/d": value})
    parts.add({"loss/d": values[0]})
    restored = Means()
    restored.load_state_dict(parts.state_dict())
    for value in values[1:]:
        restored.add({"loss/d": value})
    assert whole.pop() == restored.pop() == {"loss/d": 3.0}
    assert whole.pop() == {}
