import os

import pytest
import torch

from common.norms.backends.triton import cluster_ops, ops, tile_configs


@pytest.fixture(autouse=True)
def fresh_plans():
    """Forget how activations were walked over, since tests change the tables that it follows from."""
    plans = ops.planned, ops.channel_planned, cluster_ops.planned
    for planned in plans:
        planned.cache_clear()
    yield
    for planned in plans:
        planned.cache_clear()


@pytest.fixture(params=["small"])
def tiles(request, monkeypatch):
    """Cut tiles down, so that small inputs have many, and fill fresh memory with NaN, which shows what is not written.

    Channels are in blocks of many programs ("small"), or have a program each ("channel"); "real" tiles stay.
    """
    small = tile_configs.TileConfig(elements=64, num_warps=1)
    mixture = tile_configs.MixtureTiles(small, small, small, (8, small), (8, small))
    tables = {
        "SCB_FORWARD": small, "SCB_BACKWARD": small, "SUMS": small, "SUMS_SHARE": 1.0, "LEAST_PROGRAMS": 1,
        "MIXTURE": dict.fromkeys(tile_configs.MIXTURE, mixture), "CHANNEL_BLOCK": 16, "UNKNOWN": 16,
        "ALL_CHANNELS": 4, "PARAMETER_CHANNELS": 2,
    }  # fmt: skip
    by_channel = {"CHANNEL": tile_configs.TileConfig(elements=16, num_warps=1), "FEWEST_CHANNELS": 1}
    if request.param != "real":
        for name, value in (tables | (by_channel if request.param == "channel" else {"RESIDENT_LOCATIONS": 0})).items():
            monkeypatch.setattr(tile_configs, name, value)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Keep one part of the tests, "i/n", of those that a marker has left, where test_kernels.py asks for it."""
    i, n = map(int, os.environ.get("TEST_PART", "0/1").split("/"))
    items[:] = items[i::n]
