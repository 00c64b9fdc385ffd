"""The momentum encoder of layers whose weight is computed from others; complex parameters."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from replearn_kernels import MomentumEncoder, update_momentum


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's: parametrizations.weight_norm follows it
        return nn.utils.weight_norm(layer)


LAYERS = {
    "weight_norm": old_weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight_norm, parametrization": parametrizations.weight_norm,
    "spectral_norm, parametrization": parametrizations.spectral_norm,
}


def encoder_of(name):
    """As DINO's head has it: the last layer alone is normalised."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.GELU(), LAYERS[name](nn.Linear(4, 5, bias=False)))


@pytest.mark.parametrize("name", LAYERS)
def test_computed_weights(name):
    """Copied after a step of training: it follows, and computes the layer's weight from its own parameters."""
    encoder, x = encoder_of(name), torch.randn(6, 3)
    encoder(x).square().sum().backward()
    state = copy.deepcopy(encoder.state_dict())
    follower = MomentumEncoder(encoder.eval(), momentum=0.75)
    torch.testing.assert_close(follower(x), encoder(x), rtol=0, atol=0)
    assert not any(p.requires_grad for p in follower.parameters())
    assert all(p.requires_grad for p in encoder.parameters())
    assert sorted(follower.encoder.state_dict()) == sorted(state)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(1)
    follower.update(encoder)
    for key, value in follower.encoder.state_dict().items():
        moved = 0.25 if key in dict(encoder.named_parameters()) else 0
        torch.testing.assert_close(value, state[key] + moved)
    expected = copy.deepcopy(state)
    expected.update(follower.encoder.state_dict())
    fresh = encoder_of(name).eval()
    fresh.load_state_dict(expected)
    output = follower(x)
    torch.testing.assert_close(output, fresh(x))
    assert not output.requires_grad and not torch.allclose(output, encoder(x))
    encoder.train()(x).sum().backward()  # the source is as it was


def test_results_in_attributes():
    """Anywhere a module keeps them; shared ones stay shared."""
    encoder = nn.Linear(3, 2)
    encoder.features = {"last": [encoder(torch.randn(4, 3))]}
    encoder.last = encoder.features["last"][0]
    copied = MomentumEncoder(encoder).encoder
    assert copied.last is copied.features["last"][0] is not encoder.last
    assert torch.equal(copied.last, encoder.last) and not copied.last.requires_grad


class Filter(nn.Module):
    def __init__(self, value, dtype=torch.complex64):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), value, dtype=dtype))
        self.bias = nn.Parameter(torch.ones(1) * abs(value))


@pytest.mark.parametrize("momentum, expected", [(0.75, 1.5 + 1j), (0.0, 3 - 2j), (1.0, 1 + 2j)])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_move(momentum, expected, dtype):
    target, source = Filter(1 + 2j, dtype), Filter(3 - 2j)
    update_momentum(target, source, momentum)
    assert target.weight.dtype == dtype and target.weight.tolist() == [expected] * 2
    torch.testing.assert_close(target.bias, momentum * abs(1 + 2j) * torch.ones(1) + (1 - momentum) * abs(3 - 2j))
