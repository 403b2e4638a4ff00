"""Dropout without a state: what is dropped is as good as random, and belongs to sample, layer and unit."""

import pytest
import torch

from trainer.data.order import dropout_seeds
from trainer.models.layers import Dropout, dropping

NUM_SAMPLES, NUM_UNITS = 512, 2048


def dropped(rate: float, keys: torch.Tensor, layer: int = 0, num_units: int = NUM_UNITS) -> torch.Tensor:
    """Which units are zero, float64 `[samples, units]`."""
    dropout = Dropout(rate, layer=layer)
    with dropping([dropout], keys):
        out = dropout(torch.ones(len(keys), num_units))
    assert out[out > 0].unique().tolist() == pytest.approx([1 / (1 - rate)])
    return (out == 0).double()


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_as_many_units_are_dropped_as_by_chance(rate: float) -> None:
    """Within five standard errors, over all, and the spread over samples and over units that of a binomial law."""
    zeros = dropped(rate, dropout_seeds(NUM_SAMPLES, 0, 0))
    error = (rate * (1 - rate) / zeros.numel()) ** 0.5
    assert abs(zeros.mean().item() - rate) < 5 * error
    for dim, number in ((0, NUM_SAMPLES), (1, NUM_UNITS)):
        variance = zeros.mean(dim=dim).var().item() * number / (rate * (1 - rate))
        assert abs(variance - 1) < 5 * (2 / zeros.shape[1 - dim]) ** 0.5


@pytest.mark.parametrize("keys", [torch.arange(NUM_SAMPLES), dropout_seeds(NUM_SAMPLES, 0, 0)], ids=["next", "drawn"])
def test_samples_units_and_layers_are_independent(keys: torch.Tensor) -> None:
    zeros, others = dropped(0.5, keys), dropped(0.5, keys, layer=1)
    pairs = {
        "samples": (zeros[:-1], zeros[1:]),
        "units": (zeros[:, :-1], zeros[:, 1:]),
        "layers": (zeros, others),
    }
    for what, (a, b) in pairs.items():
        correlation = ((a - 0.5) * (b - 0.5)).mean().item() * 4
        assert abs(correlation) < 5 / a.numel() ** 0.5, what


def test_a_sample_is_treated_alike_wherever_it_is_and_otherwise_in_the_next_epoch() -> None:
    keys = dropout_seeds(NUM_SAMPLES, 3, 0)
    whole = dropped(0.5, keys)
    assert torch.equal(dropped(0.5, keys[100:200].flip(0)), whole[100:200].flip(0))
    again = dropped(0.5, dropout_seeds(NUM_SAMPLES, 3, 1))
    assert 0.45 < (again == whole).double().mean().item() < 0.55


def test_nothing_is_dropped_in_evaluation_and_learning_needs_keys() -> None:
    dropout, x = Dropout(0.5, layer=0), torch.rand(3, 4, 5)
    assert dropout.eval()(x) is x
    with pytest.raises(RuntimeError, match="inside of `dropping`"):
        dropout.train()(x)


def test_maps_keep_their_shape_type_and_gradient() -> None:
    dropout = Dropout(0.5, layer=0)
    x = torch.ones(2, 3, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    with dropping([dropout], torch.tensor([7, 8])):
        out = dropout(x)
    out.sum().backward()
    assert out.dtype is torch.bfloat16
    assert x.grad is not None
    assert torch.equal(x.grad, out.detach())
