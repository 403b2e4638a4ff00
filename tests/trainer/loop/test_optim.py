"""Our optimizers against torch's, and Muon against the singular value decomposition."""

import pytest
import torch
from torch import nn

from trainer.loop.muon import newton_schulz
from trainer.loop.optim import Optimizer
from trainer.recipes.hyperparameters import OptimizerName, ParamGroup


def _train(model: nn.Module, step, num_steps: int = 20) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        inputs = torch.randn(16, 8, generator=generator)
        model(inputs).square().mean().backward()
        step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_equals_torchs(momentum: float) -> None:
    mine, theirs = _model(), _model()
    optimizer = Optimizer([(ParamGroup(lr=0.1, momentum=momentum), list(mine.parameters()))])
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=momentum, nesterov=momentum > 0)

    def my_step() -> None:
        optimizer.step(torch.tensor(1.0))
        optimizer.zero_grad()

    def their_step() -> None:
        reference.step()
        reference.zero_grad()

    for a, b in zip(_train(mine, my_step), _train(theirs, their_step), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weights_without_a_gradient_stay_as_they_are_and_change_no_others(optimizer: OptimizerName) -> None:
    """Their norm is not in the limit, and they do not decay."""
    group = ParamGroup(lr=0.1, momentum=0.9, weight_decay=0.1, optimizer=optimizer)
    found = []
    for known in ([0, 1, 2, 3], [0, 2, 3]):
        weights = list(_model().parameters())
        start = weights[1].detach().clone()
        step = Optimizer([(group, [weights[number] for number in known])], clip_norm=0.1)
        for _ in range(3):
            for number in (0, 2, 3):
                weights[number].grad = torch.ones_like(weights[number])
            step.step(torch.tensor(1.0))
        assert torch.equal(weights[1], start)
        found.append(weights)
    assert all(torch.equal(mine, other) for mine, other in zip(*found, strict=True))


@pytest.mark.parametrize("clip_norm", [0.0, 0.3])
def test_adamw_and_the_limit_of_the_norm_equal_torchs(clip_norm: float) -> None:
    mine, theirs = _model(), _model()
    settings = {"lr": 0.01, "weight_decay": 0.1}
    group = ParamGroup(optimizer="adamw", beta1=0.8, beta2=0.99, epsilon=1e-6, **settings)
    optimizer = Optimizer([(group, list(mine.parameters()))], clip_norm=clip_norm)
    reference = torch.optim.AdamW(theirs.parameters(), betas=(0.8, 0.99), eps=1e-6, **settings)

    def my_step() -> None:
        optimizer.step(torch.tensor(1.0))
        optimizer.zero_grad()

    def their_step() -> None:
        if clip_norm:
            nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm)
        reference.step()
        reference.zero_grad()

    for a, b in zip(_train(mine, my_step), _train(theirs, their_step), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_norm_that_is_not_finite_spoils_all_weights(bad: float) -> None:
    """A run must not go on with gradients that were scaled down to nothing. The square of 1e30 is infinite."""
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    weights[0].grad, weights[1].grad = torch.tensor([1.0, bad, 1.0]), torch.ones(2)
    Optimizer([(ParamGroup(lr=0.1), weights)], clip_norm=1.0).step(torch.tensor(1.0))
    assert all(bool(weight.isnan().all()) for weight in weights)


def test_gradients_in_bfloat16_are_read_as_float32() -> None:
    """`CastWeights` leaves them so."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        groups, weights = [], [torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) for _ in range(3)]
        for weight, optimizer in zip(weights, ("sgd", "muon", "adamw"), strict=True):
            gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
            parameter = nn.Parameter(weight)
            parameter.grad_dtype = None
            parameter.grad = gradient.to(dtype)
            groups.append((ParamGroup(lr=0.1, momentum=0.9, optimizer=optimizer), [parameter]))
        Optimizer(groups, clip_norm=1.0).step(torch.tensor(1.0))
        found += weights
    assert all(torch.equal(mine, expected) for mine, expected in zip(found[:3], found[3:], strict=True))


def test_weight_decay_is_decoupled_and_relative_to_the_rate() -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.zeros(3)
    Optimizer([(ParamGroup(lr=0.5, weight_decay=0.1), [weight])]).step(torch.tensor(0.5))
    assert torch.allclose(weight, torch.full((3,), 1 - 0.25 * 0.1))


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32)])
def test_newton_schulz_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(newton_schulz(matrix, num_iterations=5))
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_muon_keeps_the_norm_of_filters_and_lowers_the_loss() -> None:
    torch.manual_seed(0)
    filters = nn.Parameter(torch.randn(8, 4, 3, 3))
    target = torch.randn(8, 4, 3, 3)
    target *= 8**0.5 / target.norm()
    optimizer = Optimizer([(ParamGroup(lr=0.05, momentum=0.6, optimizer="muon"), [filters])])
    losses = []
    for _ in range(100):
        loss = (filters - target).square().sum()
        loss.backward()
        optimizer.step(torch.tensor(1.0))
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[1]
    assert 0.7 * 8**0.5 < filters.norm() < 1.4 * 8**0.5


SGD, ADAMW = ParamGroup(lr=0.1, momentum=0.9), ParamGroup(lr=0.1, optimizer="adamw")


@pytest.mark.parametrize("groups", [(SGD, SGD), (ADAMW, ADAMW), (SGD, ADAMW)])
def test_a_loaded_state_continues_exactly(groups: tuple[ParamGroup, ParamGroup]) -> None:
    def fresh() -> tuple[nn.Module, Optimizer]:
        model = _model()
        parameters = list(model.parameters())
        return model, Optimizer([(groups[0], parameters[:2]), (groups[1], parameters[2:])])

    whole, first, second = fresh(), fresh(), fresh()
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(2))

    def run(pair: tuple[nn.Module, Optimizer], num_steps: int) -> None:
        for _ in range(num_steps):
            pair[0](inputs).square().mean().backward()
            pair[1].step(torch.tensor(1.0))
            pair[1].zero_grad()

    run(whole, 6)
    run(first, 3)
    second[0].load_state_dict(first[0].state_dict())
    saved = first[1].state_dict()
    assert set(saved) == ({"momenta", "squares", "num_steps"} if ADAMW in groups else {"momenta"})  # as in version 0.1
    second[1].load_state_dict(saved)
    run(second, 3)
    for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)
