import torch

from common.metrics.extractors import weights_hash

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(3)}


def test_the_hash_is_of_names_and_values_whatever_their_order_and_layout():
    other = {"b": torch.tensor(3), "a.weight": torch.arange(6.0).view(2, 3).T.contiguous().T}
    assert weights_hash(other) == weights_hash(STATE)


CHANGES = {
    "name": {"a.bias": STATE["a.weight"], "b": STATE["b"]},
    "shape": STATE | {"a.weight": STATE["a.weight"].view(3, 2)},
    "type": STATE | {"a.weight": STATE["a.weight"].view(torch.int32)},  # the same bytes
    "value": STATE | {"b": torch.tensor(4)},
    "one more": STATE | {"c": torch.zeros(0)},
}


def test_any_change_is_another_hash():
    for change, state in CHANGES.items():
        assert weights_hash(state) != weights_hash(STATE), change
