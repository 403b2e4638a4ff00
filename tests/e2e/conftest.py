"""Fixtures of the tests of whole runs on a GPU."""

from collections.abc import Callable, Iterator

import pytest

from tests.e2e.gpu_ranks import SHARED, first_gpu


@pytest.fixture(scope="session")
def gpu_command(trainer_command: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """The command line of a training on the GPU, which its ranks share."""

    def make(*arguments: str, ranks: int = 1) -> list[str]:
        words = trainer_command(*arguments, ranks=ranks)
        at = words.index("--device")
        return [*words[:at], *SHARED, *words[at + 2 :]]

    return make


@pytest.fixture(scope="module")
def one_gpu() -> Iterator[None]:
    """On a machine with several GPUs, processes see the first one only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", first_gpu())
        yield
