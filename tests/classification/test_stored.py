import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common.classification.stored import export, read_stored
from common.errors import UsageError
from common.runs.checkpoint import Checkpoints
from common.training.config import RunConfig, stored_yaml


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((2, 3), float(value)), "bias": torch.full((2,), float(value))}


def checkpoint(value: float, *, average: float | None = None) -> dict:
    averages = {} if average is None else {"network": weights(average)}
    return {"networks": {"network": weights(value)}, "averages": averages, "at": {"step": 1}}


@pytest.fixture
def run(tmp_path) -> Path:
    """Write a run of a kept second epoch, the best of which is the third, and a fourth."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(stored_yaml(RunConfig(epochs=7)))
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    checkpoints.save(2, checkpoint(2), epoch=2)
    checkpoints.save(3, checkpoint(3, average=3.5), best=True)
    checkpoints.save(4, checkpoint(4))
    return folder


@pytest.mark.parametrize(("which", "value"), [("last", 4), ("best", 3.5), ("2", 2)])
def test_a_runs_checkpoints_by_name_and_the_average_where_there_is_one(run, which, value):
    stored = read_stored(RunConfig, run, "network", which)
    network = nn.Linear(3, 2)
    stored.load_into(network)
    torch.testing.assert_close(dict(network.state_dict()), weights(value))
    assert (stored.cfg.epochs, stored.facts, stored.state["at"]) == (7, None, {"step": 1})


def test_what_is_not_there_is_named(run, tmp_path):
    def refuses(match: str, folder: Path = run, network: str = "network", checkpoint: str = "last") -> None:
        with pytest.raises(UsageError, match=match):
            read_stored(RunConfig, folder, network, checkpoint)

    refuses("holds no config.yaml", folder=tmp_path)
    refuses("holds the networks network, no generator; expected a run of this", network="generator")
    refuses("checkpoint: expected last, best or the number of a kept epoch, got first", checkpoint="first")
    refuses("checkpoint: .* has none of 3; there are last, best, 2$", checkpoint="3")
    (run / "checkpoints" / "best.pt").write_bytes(b"PK")
    refuses("checkpoint: .*best.pt", checkpoint="best")
    (run / "checkpoints" / "best.pt").unlink()
    refuses("has none of best; there are last, 2$", checkpoint="best")
    (run / "checkpoints" / "step-00000004.pt").unlink()
    refuses("has no checkpoint yet")
    with pytest.raises(UsageError, match=r"are not of its config.yaml \(Error"):
        read_stored(RunConfig, run, "network", "2").load_into(nn.Linear(4, 2))


def test_a_damaged_checkpoint_is_passed_over_and_told(run, capsys):
    newer = run / "checkpoints" / "step-00000005.pt"
    newer.write_bytes(b"PK")
    torch.testing.assert_close(read_stored(RunConfig, run, "network").weights, weights(4))
    line = capsys.readouterr().err
    assert line.startswith("warning: damaged checkpoint passed over")
    assert "step-00000005" in line


def test_what_is_exported_comes_back_with_its_facts(tmp_path):
    folder, network = tmp_path / "model", nn.Linear(3, 2)
    export(folder, network, RunConfig(epochs=7), {"classes": ("a", "b"), "threshold": 0.5})
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.yaml", "model.json"}
    torch.testing.assert_close(load_file(folder / "model.safetensors"), dict(network.state_dict()))
    stored = read_stored(RunConfig, folder, "anything")
    assert (stored.cfg.epochs, stored.state) == (7, {})
    assert stored.fact("classes", tuple) == ("a", "b")
    assert stored.fact("threshold", float) == 0.5
    with pytest.raises(UsageError, match=r"cannot be read as an exported model \('missing'\)"):
        stored.fact("missing", float)
    with pytest.raises(UsageError, match=r"checkpoint: .* holds an exported model, which has no best"):
        read_stored(RunConfig, folder, "network", "best")
    with pytest.raises(UsageError, match=r"out: .* holds a model already"):
        export(folder, network, RunConfig(), {})


@pytest.mark.parametrize("damage", ["weights", "facts", "list"])
def test_a_damaged_export_is_one_line(tmp_path, damage):
    export(tmp_path, nn.Linear(3, 2), RunConfig(), {})
    if damage == "weights":
        (tmp_path / "model.safetensors").write_bytes(b"damaged")
    else:
        (tmp_path / "model.json").write_text("{" if damage == "facts" else json.dumps(7))
    with pytest.raises(UsageError, match="cannot be read as an exported model"):
        read_stored(RunConfig, tmp_path, "network")


def test_weights_of_another_network_are_refused(tmp_path):
    export(tmp_path, nn.Linear(3, 2), RunConfig(), {})
    save_file({"weight": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="are not of its config"):
        read_stored(RunConfig, tmp_path, "network").load_into(nn.Linear(3, 2))
