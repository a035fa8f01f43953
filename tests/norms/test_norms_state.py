"""State dicts that become those of other layers."""

import pytest
import torch
from convert_cases import IDS, close, images, small
from torch import nn

from common.norms import SCBNorm, SCBNormBase, UCBNorm, scb_state_from_base, ucb_state_from_batch_norm


def test_state_of_a_base_layer_becomes_scbs_exactly():
    base = nn.Sequential(nn.Conv2d(3, 4, 1), SCBNormBase(4, 3, affine=True))
    scb = nn.Sequential(nn.Conv2d(3, 4, 1), SCBNorm(4, 3, affine=True))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in base.parameters():
            p.copy_(torch.randn(p.shape, generator=rng))
    scb.load_state_dict(scb_state_from_base(base.state_dict()))
    x = images()
    for ids in (IDS, torch.tensor([-1, 0, 1, -1, 2, 2])):
        assert torch.equal(scb[1].eval()(scb[0](x), ids), base[1].eval()(base[0](x), ids))
    single = SCBNorm(4, 3, affine=True)
    single.load_state_dict(scb_state_from_base(base[1].state_dict()))
    with pytest.raises(ValueError, match="state: expected the state of at least one SCBNormBase, found none"):
        scb_state_from_base(scb.state_dict())


def test_state_of_batch_norm_becomes_a_single_components():
    norms, model = small(), small()
    for place, i, norm in ((model, 1, norms[1]), (model[3], 1, norms[3][1]), (model, 6, norms[6])):
        place[i] = UCBNorm(norm.num_features, 1, eps=norm.eps, momentum=norm.momentum)
    converted = ucb_state_from_batch_norm(norms.state_dict())
    assert {name: value.dtype for name, value in converted.items()} == {
        name: value.dtype for name, value in model.state_dict().items()
    }
    model.load_state_dict(converted)
    close(model.eval()(images()), norms.eval()(images()))
    for net in (model.train(), norms.train()):
        net(images(1))
    close(model.eval()(images()), norms.eval()(images()))
    with pytest.raises(ValueError, match="state: expected the state of at least one BatchNorm, found none"):
        ucb_state_from_batch_norm(model.state_dict())
