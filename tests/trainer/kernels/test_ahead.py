"""Kernels are compiled in the background, and they are those that a step starts. No GPU is needed."""

import importlib.util
import shutil
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.trainer.loop.runs import ALONE, SHORT, make_run
from trainer.data import Dataset, ImageSet
from trainer.kernels import choice
from trainer.kernels.ahead import Compilation, is_cache_empty
from trainer.kernels.launch import launch
from trainer.loop import step as steps
from trainer.loop.rehearsal import await_kernels, compile_ahead, start_compilers
from trainer.loop.sources import ResidentSource
from trainer.ranks.consistency import digest_of
from trainer.recipes import RECIPES, Recipe

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is for Linux")

CPU = torch.device("cpu")


@dataclass
class Gpu:
    """A GPU that is not there, as Triton's driver: kernels are compiled for it, and started in vain."""

    launchers: list[str] = field(default_factory=list)
    """Of the kernels that are ready to be started, in the order in which they became so."""
    started: list[str] = field(default_factory=list)
    compiled: list[str] = field(default_factory=list)
    """Names of kernels that were not in the cache."""
    capability: int = 90

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return id(self)  # Triton keeps what it compiled by this number

    def get_current_stream(self, _device: int) -> int:
        return 0

    @property
    def utils(self) -> Any:
        return SimpleNamespace(
            get_device_properties=lambda _device: {"max_shared_mem": 227 << 10},
            load_binary=lambda *_: (1, 1, 0, 0, 1024),
            unload_module=lambda _module: None,
        )

    def launcher_cls(self, _source: Any, metadata: Any) -> Callable[..., None]:
        self.launchers.append(metadata.hash)
        return lambda *_, **__: self.started.append(metadata.hash)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Kernels of tensors on the CPU are compiled for this GPU, with an empty cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from triton import knobs
    from triton.runtime import driver

    gpu = Gpu()

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            gpu.compiled.append(src.name)

    monkeypatch.setattr(knobs.compilation, "listener", listen)
    monkeypatch.setattr(driver, "_active", gpu)
    monkeypatch.setattr(choice, "_is_supported", lambda device: True)
    monkeypatch.setattr(choice, "unsupported_reason", lambda device: None)
    return gpu


def add_up() -> None:
    from trainer.kernels import fused

    fused.add_up(torch.ones(2, 3))


def test_a_rehearsed_kernel_is_compiled_in_the_background_and_ready_to_be_started(gpu: Gpu) -> None:
    before = set(threading.enumerate())
    compilation = Compilation(CPU, 2)
    with compilation.rehearsal():
        add_up()
        add_up()
    assert not gpu.started
    compilation.wait()
    assert gpu.compiled == ["merge_sums"]
    assert len(gpu.launchers) == 1
    add_up()
    assert gpu.started == gpu.launchers
    assert gpu.compiled == ["merge_sums"]
    compilation.close()
    assert set(threading.enumerate()) <= before


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the process has ended
        return b""


def test_processes_fill_the_cache_and_end(gpu: Gpu) -> None:
    compilation = Compilation(CPU, 2, has_processes=True)
    with compilation.rehearsal():
        add_up()
    compilation.wait()
    assert not gpu.compiled  # by this process
    assert len(gpu.launchers) == 1
    add_up()
    assert gpu.started == gpu.launchers
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"trainer.kernels.compiler" in read(path)]


def test_a_process_that_is_gone_is_done_without(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    compilation = Compilation(CPU, 1, has_processes=True)
    with compilation.rehearsal():
        add_up()
    compilation.wait()
    assert gpu.compiled == ["merge_sums"]


@pytest.mark.parametrize(("variable", "folder"), [("TRITON_CACHE_DIR", "."), ("TRITON_HOME", ".triton/cache")])
def test_an_empty_cache_is_known(variable: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    assert is_cache_empty()
    (tmp_path / folder / "kernel").mkdir(parents=True)
    assert not is_cache_empty()


def test_an_error_in_the_background_is_left_to_the_step(gpu: Gpu, capfd: pytest.CaptureFixture[str]) -> None:
    from trainer.kernels import norm_kernels

    compilation = Compilation(CPU, 1)
    with compilation.rehearsal():
        launch(norm_kernels.merge_sums, (1,), torch.ones(2, 3), torch.ones(3), 3, BC=3, PROGRAMS=2)  # no power of two
    compilation.wait()
    assert not gpu.launchers
    add_up()
    assert gpu.started
    assert "Exception in thread" not in capfd.readouterr().err


def test_threads_end_when_a_run_does(gpu: Gpu) -> None:
    from trainer.kernels import fused

    before = set(threading.enumerate())
    never, ended = Compilation(CPU, 1), Compilation(CPU, 1)
    with ended.rehearsal():
        for programs in (2, 4, 8, 16):
            fused.add_up(torch.ones(programs, 3))
    for compilation in (never, ended):
        compilation.close()
    assert set(threading.enumerate()) <= before


def tensors(state: Any) -> list[torch.Tensor]:
    """All tensors of a state."""
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
    return [tensor for value in values for tensor in tensors(value)]


AIRBENCH = RECIPES["cifar10-fast"]
SMALL = replace(
    AIRBENCH, widths=(16, 24, 40), global_batch_size=40, num_validation=0, resolutions=AIRBENCH.resolutions[:1]
)
OF_MNIST = replace(RECIPES["mnist"], global_batch_size=30, num_validation=0, epochs=1)
RUNS = [
    pytest.param(SMALL, 80, (3, 32), 1, True, id="kinds of steps"),
    pytest.param(OF_MNIST, 101, (1, 28), 2, False, id="shards, and an epoch's last batch"),
]


@pytest.mark.minutes
@pytest.mark.parametrize(("recipe", "number", "shape", "num_shards", "has_processes"), RUNS)
def test_the_kernels_of_a_rehearsal_are_those_of_the_steps(  # noqa: PLR0913 (fixtures)
    recipe: Recipe,
    number: int,
    shape: tuple[int, int],
    num_shards: int,
    has_processes: bool,
    gpu: Gpu,
    mini: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(steps, "_is_cast_together", lambda *_: True)  # as on GPUs
    world = replace(ALONE, virtual_shards=num_shards, on_leave=ExitStack())
    with choice.torch_only():
        run = make_run(recipe, blank(mini, number, *shape), tmp_path / "run", world=world)
    run.learner.train_step._autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    before = digest_of(tensors(run.learner.state_dict()))
    compile_ahead(run, Compilation(CPU, 2, has_processes=has_processes))
    assert torch.equal(digest_of(tensors(run.learner.state_dict())), before)
    await_kernels(run)
    assert not gpu.started
    compiled, source = len(gpu.compiled), ResidentSource(run)
    assert not compiled if has_processes else compiled > 10
    seen = set()
    for step in range(run.num_steps):
        batch = source.batch(step)
        if (batch.kind, batch.sizes) not in seen:
            seen.add((batch.kind, batch.sizes))
            run.learner.step(batch)
    assert len(seen) > 1
    assert len(gpu.compiled) == compiled
    assert set(gpu.started) == set(gpu.launchers)


def blank(mini: Dataset, number: int, channels: int, size: int) -> Dataset:
    """A data set of black images."""
    train = ImageSet(torch.zeros(number, channels, size, size, dtype=torch.uint8), torch.arange(number) % 10)
    return replace(mini, train=train, mean=(128.0,) * channels, std=(70.0,) * channels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("name", "shape", "augment"),
    [
        ("mnist-fast", (1, 28), {}),
        ("cifar10-fast", (3, 32), {}),
        ("cifar10-fast", (3, 32), {"policy": "trivial", "rotate_degrees": 10.0}),  # which reads levels of the images
    ],
)
def test_on_a_gpu_the_steps_of_a_run_compile_nothing(
    name: str,
    shape: tuple[int, int],
    augment: dict[str, Any],
    mini: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from triton import knobs

    compiled: list[str] = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda *, src, cache_hit, **_: compiled.append(src.name))
    device = torch.device("cuda", 0)
    assert choice.unsupported_reason(device) is None
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    forget_kernels()
    recipe = replace(RECIPES[name], num_validation=0, augment=replace(RECIPES[name].augment, **augment))
    world = replace(ALONE, device=device, on_leave=ExitStack())
    dataset = blank(mini, 2 * recipe.global_batch_size + 50, *shape)
    run = make_run(recipe, dataset, tmp_path / "run", world=world)
    before = digest_of(tensors(run.learner.state_dict())).cpu()
    compilation = start_compilers(world)
    assert compilation is not None
    compile_ahead(run, compilation)
    assert torch.equal(digest_of(tensors(run.learner.state_dict())).cpu(), before)
    await_kernels(run)
    num_compiled, source = len(compiled), ResidentSource(run)
    for step in range(run.num_steps):  # eager ones, captures, and replays
        run.learner.step(source.batch(step))
    assert compiled[num_compiled:] == []
    run.learner.release()
    world.on_leave.close()


def forget_kernels() -> None:
    """Makes this process compile or load each kernel again."""
    from triton.runtime.jit import JITFunction

    for module in [module for name, module in sys.modules.items() if name.startswith("trainer.kernels.")]:
        for value in vars(module).values():
            if isinstance(value, JITFunction):
                value.device_caches.clear()


def test_what_has_no_kernels_is_not_rehearsed(mini: Dataset, tmp_path: Path) -> None:
    assert start_compilers(ALONE) is None
    run = make_run(SHORT, mini, tmp_path / "run")
    compile_ahead(run, Compilation(CPU, 1))
    assert run.kernels is None
    await_kernels(run)
