"""Muon of many filters at once against Muon of one after the other."""

import pytest
import torch

from trainer.loop.muon import BatchedMuon, muon_step

SHAPES = [
    pytest.param([(4, 3, 3, 3), (6, 4, 3, 3), (6, 6, 3, 3), (5, 8)], id="one padded batch"),
    pytest.param([(16, 1, 1, 1), (3, 2, 3, 3), (3, 2, 3, 3), (2, 40)], id="tall and wide, by shape"),
]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_a_batch_is_one_after_the_other(shapes: list[tuple[int, ...]], memory_format: torch.memory_format) -> None:
    random = torch.Generator().manual_seed(0)

    def draw() -> list[torch.Tensor]:
        drawn = [torch.randn(shape, generator=random) for shape in shapes]
        return [each.contiguous(memory_format=memory_format) if each.ndim == 4 else each for each in drawn]

    ours, updates, lr = draw(), draw(), torch.tensor(0.3)
    theirs = [each.clone(memory_format=torch.contiguous_format) for each in ours]
    muon = BatchedMuon(ours)
    for _ in range(2):
        muon.step(updates, lr)
        muon_step(theirs, updates, lr)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-4)


def test_a_batch_needs_few_operations() -> None:
    parameters = [torch.randn(8, 4 + number, 3, 3) for number in range(6)]
    updates = [torch.randn_like(each) for each in parameters]
    muon, lr = BatchedMuon(parameters), torch.tensor(0.1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as batched:
        muon.step(updates, lr)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as single:
        muon_step(parameters, updates, lr)
    products = [
        sum(event.count for event in profile.key_averages() if "mm" in event.key) for profile in (batched, single)
    ]
    assert products[0] * 4 < products[1]
