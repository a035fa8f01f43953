"""A training step asks the device for nothing, so that a GPU need not be waited for.

The layers run on torch's meta device, whose tensors have no values: whatever would read one on the host, such as
``item``, ``bool``, ``tolist``, ``nonzero`` or a copy to the CPU, raises.
"""

from contextlib import nullcontext

import pytest
import torch
from norm_cases import any_norm, batch, inputs

LAYERS = {
    "ucb joint, plain average": ("ucb", {"groups": 1, "average": "paper"}),
    "ucb seeded": ("ucb", {"init": "kmeans++"}),
    "ucb reseed": ("ucb", {"groups": 2, "reseed": 0.01, "variance": "shared"}),
    "ucb weight": ("ucb", {"update": "weight"}),
    "ucb learned": ("ucb", {"update": "weight", "statistics": "learned"}),
    "mn, each channel, refit": ("mn", {"groups": None, "refit_every": 2}),
    "scb": ("scb", {}),
    "scb_base": ("scb_base", {"init": "data"}),
}
SHAPE = (6, 4, 20, 40)  # 4,800 locations, more than a fit takes


@pytest.fixture(autouse=True)
def meta_as_a_gpu(monkeypatch):
    """Leave out what exists on a GPU but not on meta."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


def on_meta(case: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """Return a layer that has trained, and the arguments of its next step, all without values."""
    kind, options = LAYERS[case]
    layer = any_norm(kind, 4, 3, **options)
    for seed in range(2):  # seeds the layer, and lets it see that it is
        layer(*inputs(kind, batch(seed, SHAPE)))
    x, *ids = inputs(kind, torch.empty(SHAPE, device="meta", requires_grad=True))
    return layer.to("meta"), (x, *(t.to("meta") for t in ids))


@pytest.mark.parametrize("case", LAYERS)
def test_a_training_step_asks_the_device_for_nothing(case):
    layer, args = on_meta(case)
    for _ in range(3):
        layer(*args).sum().backward()
    assert args[0].grad is not None


def test_after_a_state_is_loaded_it_asks_once():
    layer, args = on_meta("mn, each channel, refit")
    layer.load_state_dict(layer.state_dict())
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        layer(*args)
