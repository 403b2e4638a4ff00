"""Tests of stateless dropout: it behaves like a random draw that depends on sample, layer and unit alone."""

import pytest
import torch

from trainer.data.order import dropout_seeds
from trainer.models.layers import Dropout, use_dropout_seeds

NUM_SAMPLES, NUM_UNITS = 512, 2048


def dropped(rate: float, seeds: torch.Tensor, layer: int = 0, num_units: int = NUM_UNITS) -> torch.Tensor:
    """Returns 1 where a unit is dropped and 0 elsewhere, float64 `[samples, units]`."""
    dropout = Dropout(rate, layer=layer)
    with use_dropout_seeds([dropout], seeds):
        out = dropout(torch.ones(len(seeds), num_units))
    assert out[out > 0].unique().tolist() == pytest.approx([1 / (1 - rate)])
    return (out == 0).double()


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_dropped_units_follow_a_binomial_distribution(rate: float) -> None:
    """Checks the overall rate and the variance over samples and over units, within five standard errors."""
    zeros = dropped(rate, dropout_seeds(NUM_SAMPLES, 0, 0))
    error = (rate * (1 - rate) / zeros.numel()) ** 0.5
    assert abs(zeros.mean().item() - rate) < 5 * error
    for dim, number in ((0, NUM_SAMPLES), (1, NUM_UNITS)):
        variance = zeros.mean(dim=dim).var().item() * number / (rate * (1 - rate))
        assert abs(variance - 1) < 5 * (2 / zeros.shape[1 - dim]) ** 0.5


@pytest.mark.parametrize(
    "seeds", [torch.arange(NUM_SAMPLES), dropout_seeds(NUM_SAMPLES, 0, 0)], ids=["consecutive", "drawn"]
)
def test_samples_units_and_layers_are_independent(seeds: torch.Tensor) -> None:
    zeros, others = dropped(0.5, seeds), dropped(0.5, seeds, layer=1)
    pairs = {
        "samples": (zeros[:-1], zeros[1:]),
        "units": (zeros[:, :-1], zeros[:, 1:]),
        "layers": (zeros, others),
    }
    for name, (a, b) in pairs.items():
        correlation = ((a - 0.5) * (b - 0.5)).mean().item() * 4
        assert abs(correlation) < 5 / a.numel() ** 0.5, name


def test_a_sample_drops_the_same_units_at_every_position_and_others_in_the_next_epoch() -> None:
    seeds = dropout_seeds(NUM_SAMPLES, 3, 0)
    whole = dropped(0.5, seeds)
    assert torch.equal(dropped(0.5, seeds[100:200].flip(0)), whole[100:200].flip(0))
    next_epoch = dropped(0.5, dropout_seeds(NUM_SAMPLES, 3, 1))
    assert 0.45 < (next_epoch == whole).double().mean().item() < 0.55


def test_evaluation_drops_nothing_and_training_needs_seeds() -> None:
    dropout, x = Dropout(0.5, layer=0), torch.rand(3, 4, 5)
    assert dropout.eval()(x) is x
    with pytest.raises(RuntimeError, match="within `use_dropout_seeds` only"):
        dropout.train()(x)


def test_shape_and_dtype_are_kept_and_gradients_match_the_mask() -> None:
    dropout = Dropout(0.5, layer=0)
    x = torch.ones(2, 3, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    with use_dropout_seeds([dropout], torch.tensor([7, 8])):
        out = dropout(x)
    out.sum().backward()
    assert out.dtype is torch.bfloat16
    assert x.grad is not None
    assert torch.equal(x.grad, out.detach())
