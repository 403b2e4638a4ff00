"""DDP, over gloo: the same training as on one rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.conftest import ROOT, clean_environment, free_port
from tests.interpreter import Interpreter
from tests.trainer.loop.runs import ALONE
from tests.trainer.ranks.ddp_ranks import CASES, Case, train
from trainer.config import GradientReduction
from trainer.data import Dataset
from trainer.ranks.activity import Activity
from trainer.ranks.data_parallel import DataParallel, uses_ddp

Trained = dict[int, list[dict[str, Any]]]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("choice", "device", "size", "virtual_shards", "expected"),
    [
        ("auto", GPU, 2, None, True),
        ("auto", GPU, 1, None, False),
        ("auto", GPU, 2, 4, False),
        ("auto", CPU, 2, None, False),
        ("vector", GPU, 2, None, False),
        ("ddp", CPU, 2, None, True),
        ("ddp-bfloat16", CPU, 3, None, True),
        ("ddp", GPU, 1, None, False),
    ],
)
def test_where_ddp_is_used(
    choice: GradientReduction, device: torch.device, size: int, virtual_shards: int | None, expected: bool
) -> None:
    assert uses_ddp(choice, device, size=size, virtual_shards=virtual_shards) == expected


def test_every_pass_that_waits_for_other_ranks_counts_as_a_collective() -> None:
    """A host that is lost in such a pass is then reported as lost, and not as a defect of this rank."""
    calls = []

    class Counting(Activity):
        @contextmanager
        def collective(self) -> Iterator[None]:
            calls.append("collective")
            yield

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = DataParallel(torch.nn.Linear(4, 3), Counting())
        for _ in range(3):
            loss = parallel.forward(torch.ones(2, 4), is_last=True).sum()
            calls.append("forward")
            parallel.backward(loss.backward, is_last=True)
            calls.append("backward")
    finally:
        dist.destroy_process_group()
    # In the third forward pass the ranks exchange the order of the gradients.
    forward, backward = ["forward"], ["collective", "backward"]
    assert calls == [*forward, *backward, *forward, *backward, "collective", *forward, *backward]


@pytest.fixture(scope="module")
def trained(
    mini: Dataset, data_dir: Path, tmp_path_factory: pytest.TempPathFactory, interpreter: Interpreter
) -> Trained:
    """What each rank of 2 and of 3 has trained."""
    folder = tmp_path_factory.mktemp("ddp")
    command = ["-m", "tests.trainer.ranks.ddp_ranks", str(data_dir), str(folder), str(free_port())]
    done = interpreter.run(command, env=clean_environment() | {"OMP_NUM_THREADS": "1"}, cwd=ROOT, timeout_s=300)
    assert (done.returncode, done.stderr) == (0, "")
    return {size: [torch.load(folder / str(size) / f"{rank}.pt") for rank in range(size)] for size in (2, 3)}


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(item, f"{name}.{key}")


def alone(case: Case, size: int, mini: Dataset, folder: Path) -> dict[str, Any]:
    """Trains on one rank, with the shards of `size` ranks. The number of threads decides the rounding."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train(Case(case.recipe, num_parts=case.num_parts * size, reduction="auto"), mini, folder, ALONE)
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if 2 in case.num_ranks and name != "bfloat16"])
def test_two_ranks_train_to_the_bits_of_one(name: str, trained: Trained, mini: Dataset, tmp_path: Path) -> None:
    """Two numbers have one sum, and DDP's factors are powers of two. The last batch has shards without images."""
    expected = alone(CASES[name], 2, mini, tmp_path)
    for rank in trained[2]:
        for (key, mine), (_, theirs) in zip(tensors(rank[name]), tensors(expected), strict=True):
            assert torch.equal(mine, theirs), key


def test_three_ranks_train_to_the_weights_of_one_up_to_rounding(
    trained: Trained, mini: Dataset, tmp_path: Path
) -> None:
    """The last batch of an epoch has two images, so that one rank has none."""
    expected = alone(CASES["plain"], 3, mini, tmp_path / "plain")
    for rank in trained[3]:
        for (key, mine), (_, theirs) in zip(tensors(rank["plain"]), tensors(expected), strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5), key
    name = "norms, ranks without images"
    expected = alone(CASES[name], 3, mini, tmp_path / "norms")
    (first, *others) = (dict(tensors(rank[name])) for rank in trained[3])
    assert torch.allclose(first[".results"], expected["results"], rtol=1e-3)
    assert all(torch.equal(other[key], value) for other in others for key, value in first.items())


def test_a_run_that_continues_adds_up_in_the_same_order(trained: Trained) -> None:
    """DDP orders its buckets after the first backward passes: one that began anew would round in another way."""
    for rank in trained[3]:
        for (key, mine), (_, theirs) in zip(tensors(rank["plain"]), tensors(rank["continued"]), strict=True):
            assert torch.equal(mine, theirs), key


def test_gradients_in_bfloat16_are_rounded_and_close(trained: Trained, mini: Dataset, tmp_path: Path) -> None:
    expected = alone(CASES["plain"], 2, mini, tmp_path)["results"][:, 0]
    for rank in trained[2]:
        losses = rank["bfloat16"]["results"][:, 0]
        assert torch.allclose(losses, expected, rtol=0.02)
        assert not torch.equal(losses, expected)
