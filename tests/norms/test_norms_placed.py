"""``device`` and ``dtype`` of the layers: as torch's own take them, and with the same start everywhere."""

import pytest
import torch
from norm_cases import any_norm

LAYERS = {
    "bn": ("bn", {}),
    "in": ("in", {"affine": True}),
    "dsbn": ("dsbn", {}),
    "mn": ("mn", {}),
    "scb": ("scb", {"affine": True, "init": "data"}),
    "scb_base": ("scb_base", {}),
    "ucb reseed": ("ucb", {"reseed": 0.01, "groups": 2, "seed": 3}),
    "ucb weight": ("ucb", {"update": "weight", "init": "kmeans++"}),
}


def make(case: str, **placed):
    kind, options = LAYERS[case]
    return any_norm(kind, 4, 3, **options, **placed)


def described(layer: torch.nn.Module) -> dict[str, tuple[torch.dtype, str]]:
    return {name: (t.dtype, t.device.type) for name, t in layer.state_dict().items()}


def test_a_layer_is_made_as_it_would_be_moved():
    for case in LAYERS:
        moved = make(case).to(device="meta", dtype=torch.float64)
        assert described(make(case, device="meta", dtype=torch.float64)) == described(moved), case
        with torch.device("meta"):
            assert described(make(case, dtype=torch.float64)) == described(moved), case
        placed, plain = make(case, device="cpu", dtype=torch.float64).state_dict(), make(case).double().state_dict()
        torch.testing.assert_close(placed, plain, rtol=1e-7, atol=0)  # a third is exacter in float64


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_from_meta_starts_as_any_other(case):
    layer, plain = make(case, device="meta").to_empty(device="cpu"), make(case)
    layer.reset_parameters()
    torch.testing.assert_close(layer.state_dict(), plain.state_dict(), rtol=0, atol=0)
    x, ids = torch.randn(6, 4, 5), torch.arange(6) % 3
    args = (x, ids) if LAYERS[case][0] in ("dsbn", "scb", "scb_base") else (x,)
    for _ in range(2):  # the first seeds what is seeded from data
        assert torch.equal(layer(*args), plain(*args))
    torch.testing.assert_close(layer.state_dict(), plain.state_dict(), rtol=0, atol=0)
