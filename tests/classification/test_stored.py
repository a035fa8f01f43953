import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common.classification.stored import StoredModel, read_stored
from common.runtime.errors import UsageError
from common.train.checkpoint import Checkpoints
from common.train.config import RunConfig, stored_yaml


@dataclass(frozen=True, eq=False)
class Toy(StoredModel[RunConfig]):
    classes: tuple[str, ...]
    threshold: float
    protocol: dict[str, str]


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((2, 3), float(value)), "bias": torch.full((2,), float(value))}


def checkpoint(value: float, *, average: float | None = None) -> dict:
    averages = {} if average is None else {"network": weights(average)}
    return {"networks": {"network": weights(value)}, "averages": averages, "statistics": {}, "run": {"step": 1}}


@pytest.fixture
def run(tmp_path) -> Path:
    """Write a run of a kept second epoch, the best of which is the third, and a fourth."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(stored_yaml(RunConfig(epochs=7)))
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(2, checkpoint(2), epoch=2)
    checkpoints.save(3, checkpoint(3, average=3.5), best=True)
    checkpoints.save(4, checkpoint(4))
    return folder


def test_a_runs_checkpoints_by_name_and_the_average_where_there_is_one(run):
    for which, value in (("last", 4), ("best", 3.5), ("2", 2)):
        stored = read_stored(RunConfig, run, "network", which)
        network = nn.Linear(3, 2)
        stored.load_into(network)
        torch.testing.assert_close(dict(network.state_dict()), weights(value))
        assert (stored.cfg.epochs, stored.facts, stored.state["run"]) == (7, None, {"step": 1})


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
    for path in (run / "checkpoints").glob("step-*.pt"):
        path.unlink()
    refuses("has no checkpoint yet")
    with pytest.raises(UsageError, match=r"are not of its config.yaml \(Error"):
        read_stored(RunConfig, run, "network", "2").load_into(nn.Linear(4, 2))


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(run, capsys):
    newer = run / "checkpoints" / "step-00000005.pt"
    newer.write_bytes(b"PK")
    torch.testing.assert_close(read_stored(RunConfig, run, "network").weights, weights(4))
    line = capsys.readouterr().err
    assert line.startswith("warning: damaged checkpoint passed over")
    assert "step-00000005" in line


def toy() -> Toy:
    return Toy(nn.Linear(3, 2), RunConfig(epochs=7), ("a", "b"), 0.5, {"content": "abc"})


def read_toy(folder: Path) -> Toy:
    def facts_of_a_run():
        pytest.fail("a folder that was exported holds its own")

    return read_stored(RunConfig, folder, "anything").model(Toy, facts_of_a_run, lambda _: nn.Linear(3, 2))


def test_what_is_exported_comes_back_with_its_facts(tmp_path):
    folder, model = tmp_path / "model", toy()
    model.save(folder)
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.yaml", "model.json"}
    torch.testing.assert_close(load_file(folder / "model.safetensors"), dict(model.network.state_dict()))
    found = read_toy(folder)
    torch.testing.assert_close(dict(found.network.state_dict()), dict(model.network.state_dict()), rtol=0, atol=0)
    assert not found.network.training
    assert (found.cfg.epochs, found.device.type) == (7, "cpu")
    assert (found.classes, found.threshold, found.protocol) == (("a", "b"), 0.5, {"content": "abc"})
    with pytest.raises(UsageError, match=r"checkpoint: .* holds an exported model, which has no best"):
        read_stored(RunConfig, folder, "network", "best")
    with pytest.raises(UsageError, match=r"out: .* holds a model already"):
        model.save(folder)


def test_a_runs_facts_are_asked_for(run):
    found = read_stored(RunConfig, run, "network").model(
        Toy, lambda: {"classes": ("x",), "threshold": 1.0, "protocol": {}}, lambda facts: nn.Linear(3, 2)
    )
    torch.testing.assert_close(dict(found.network.state_dict()), weights(4))
    assert (found.classes, found.threshold) == (("x",), 1.0)


def test_names_come_from_the_runs_file_or_else_from_its_images(run):
    stored = read_stored(RunConfig, run, "network")
    assert stored.noted("names.json", tuple, lambda: ("images",)) == ("images",)
    with pytest.raises(UsageError, match=r"names\.json cannot be read \(.*No such file.*\); restore it$"):
        stored.noted("names.json", tuple)
    (run / "names.json").write_text('["a", "b"]')
    assert stored.noted("names.json", tuple, lambda: ("images",)) == ("a", "b")
    (run / "names.json").write_text("[")
    with pytest.raises(UsageError, match=r"names\.json cannot be read .*; remove it, and names are taken from the im"):
        stored.noted("names.json", tuple, lambda: ("images",))


def test_damaged_exports_are_one_line(tmp_path):
    for number, (name, text) in enumerate((
        ("model.safetensors", "damaged"),
        ("model.json", "{"),
        ("model.json", json.dumps(7)),
        ("model.json", json.dumps({"classes": ["a"]})),
        ("model.json", json.dumps({"classes": ["a"], "threshold": "high", "protocol": {}})),
    )):  # fmt: skip
        folder = tmp_path / str(number)
        toy().save(folder)
        (folder / name).write_text(text)
        with pytest.raises(UsageError, match="cannot be read as an exported model"):
            read_toy(folder)
    toy().save(tmp_path)
    save_file({"weight": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="are not of its config"):
        read_toy(tmp_path)
