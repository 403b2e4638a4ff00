"""Compiles the kernels of whole steps for GPUs, which needs none, from the arguments with which they are started."""

import importlib.util
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.loop.runs import ALONE
from trainer.data import Dataset, ImageSet
from trainer.data.augment import draw_params
from trainer.kernels import choice
from trainer.loop.learner import initial_model, parameter_groups
from trainer.loop.loss import TrainingLoss
from trainer.loop.optim import Optimizer
from trainer.loop.step import Batch, StepKind, TrainStep
from trainer.recipes import RECIPES, Augment, Recipe

pytestmark = [
    pytest.mark.minutes,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is for Linux"),
]

COLOURFUL = replace(
    RECIPES["cifar10-fast"],
    widths=(16, 24, 40),
    global_batch_size=40,
    augment=Augment(flip="random", flip_vertical="random", shift=2, brightness=0.1, contrast=0.1, saturation=0.1),
)
RECIPES_AND_SHAPES = [
    pytest.param(replace(RECIPES["mnist"], global_batch_size=20), (1, 28), id="mnist"),
    pytest.param(replace(RECIPES["mnist-fast"], global_batch_size=50), (1, 28), id="mnist-fast"),
    pytest.param(COLOURFUL, (3, 32), id="colours and two sizes"),
    pytest.param(replace(RECIPES["cifar10-resnet18"], global_batch_size=2, augment=Augment()), (3, 32), id="resnet18"),
]


Compiled = dict[str, tuple[str, dict[str, Any], Any]]
"""Compiled kernels by their hash, with names and constants."""


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU that is not there, as Triton's driver."""

    capability: int

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it compiled by this number

    def get_current_stream(self, _device: int) -> int:
        return 0


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """The kernels that this test starts are compiled instead."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction, KernelInterface

    found: Compiled = {}

    def started(kernel: JITFunction[Any], grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_it(*arguments: Any, **constants: Any) -> None:
            result = kernel.warmup(*arguments, grid=grid, **constants)
            found[result.hash] = kernel.fn.__name__, constants, result

        return compile_it

    monkeypatch.setattr(KernelInterface, "__getitem__", started)
    monkeypatch.setattr(driver, "_active", Target(90))
    monkeypatch.setattr(choice, "_is_supported", lambda device: True)
    monkeypatch.setattr(choice, "unsupported_reason", lambda device: None)
    return found


def run_step(recipe: Recipe, shape: tuple[int, int], mini: Dataset) -> None:
    """Runs a step of each size of images on the CPU, in bfloat16; its values are those of uninitialised memory."""
    (channels, size), batch_size = shape, recipe.global_batch_size
    train = ImageSet(torch.zeros(60, channels, size, size, dtype=torch.uint8), torch.arange(60) % 10)
    dataset = replace(mini, train=train, mean=(128.0,) * channels, std=(70.0,) * channels)
    with choice.torch_only():
        model = initial_model(recipe, dataset, torch.arange(60), seed=0).to(memory_format=torch.channels_last).train()
    step = TrainStep(
        model=model,
        optimizer=Optimizer(parameter_groups(model, recipe)),
        augment=recipe.augment,
        loss=TrainingLoss(recipe.label_smoothing),
        autocast=partial(torch.autocast, "cpu", dtype=torch.bfloat16),
        world=ALONE,
    )
    params, part = draw_params(recipe.augment, 60, seed=0, epoch=0), slice(3, 3 + batch_size)
    for image_size in {None, *(size for _, size in recipe.resolutions[:1])}:
        batch = Batch(
            images=train.images,
            indices=torch.arange(60)[part],  # a slice, as of an epoch's
            labels=train.labels[part],
            augment_params=params[part],
            dropout_seeds=torch.zeros(batch_size, dtype=torch.int64),
            lr_factor=torch.ones(()),
            sizes=(batch_size,),
            num_images=batch_size,
            kind=StepKind(image_size=image_size),
        )
        step(batch)


@pytest.mark.parametrize(("recipe", "shape"), RECIPES_AND_SHAPES)
def test_the_kernels_of_a_step_compile_with_wide_loads_and_without_spills(
    recipe: Recipe, shape: tuple[int, int], mini: Dataset, compiled: Compiled, tmp_path: Path
) -> None:
    run_step(recipe, shape, mini)
    assert len(compiled) > 10
    for name, constants, kernel in compiled.values():
        if constants.get("UNIT") == 8 and constants.get("BM", 0) * constants["BC"] >= 256 * kernel.metadata.num_warps:
            is_wide = any(load in kernel.asm["ptx"] for load in ("ld.global.v4", "cp.async.cg"))
            assert is_wide, f"{name} loads less than 16 bytes at a time: {constants}"
        registers, local_bytes = resources(kernel.asm["cubin"], tmp_path)
        assert registers < 255, (name, constants)
        assert local_bytes <= 16 or name == "gather_and_warp", (name, constants)  # sines of large angles need some
        is_product = name in ("convolve", "weight_gradient")  # of blocks in several stages
        assert kernel.metadata.shared <= (96 if is_product else 48) << 10, (name, constants)


def resources(cubin: bytes, folder: Path) -> tuple[int, int]:
    """Returns a thread's registers and bytes of local memory, as a tool of CUDA's reads them that comes with Triton."""
    import triton

    tool, file = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump", folder / "kernel.cubin"
    file.write_bytes(cubin)
    done = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", done.stdout)
    assert found is not None, done.stdout
    return int(found[1]), int(found[2]) + int(found[3])


def test_they_compile_for_older_gpus(mini: Dataset, compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import driver

    monkeypatch.setattr(driver, "_active", Target(80))
    run_step(replace(RECIPES["mnist-fast"], global_batch_size=50), (1, 28), mini)
    assert {kernel.metadata.target.arch for _, _, kernel in compiled.values()} == {80}
