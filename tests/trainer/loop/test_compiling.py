"""`--compile`: which passes are compiled, what the user is told, and that the arithmetic stays the same."""

import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import ROOT, clean_environment
from tests.trainer.loop.runs import ALONE, SHORT
from trainer.config import TrainConfig
from trainer.data import Dataset, ImageSet
from trainer.errors import ConfigError
from trainer.loop import compiling
from trainer.loop.compiling import CompiledNetwork
from trainer.loop.fit import fit
from trainer.loop.run import Run
from trainer.progress import Progress
from trainer.ranks.activity import SLOW_PHASE_TIMEOUT_S, Activity
from trainer.ranks.world import World
from trainer.recipes import RECIPES, Recipe
from trainer.records.checkpoint import weights_sha256
from trainer.records.run_folder import RunFolder
from trainer.signals import StopRequest
from trainer.train import setup


@pytest.fixture
def compiled_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of images of each call of a compiled network; nothing is really compiled."""
    sizes: list[int] = []

    def pretend(forward: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        warnings.warn("torch 2.11 warns while it imports its compiler", DeprecationWarning, stacklevel=1)

        def compiled(pixels: torch.Tensor) -> Any:
            sizes.append(len(pixels))
            return forward(pixels)

        return compiled

    monkeypatch.setattr(torch, "compile", pretend)
    monkeypatch.setattr(compiling, "check_compiler", lambda device: None)
    monkeypatch.setattr(compiling, "_options", dict)
    return sizes


def compiled_run(
    recipe: Recipe, dataset: Dataset, folder: Path, world: World = ALONE, *, is_compiled: bool = True
) -> Run:
    config = TrainConfig(run_dir=folder, compile=is_compiled)
    run_folder = RunFolder.plan(config, recipe, dataset, world)
    run_folder.enter(config.resume, world)
    return setup(recipe, dataset, run_folder, world, Progress(is_main=True))


def few_of(mini: Dataset) -> Dataset:
    """110 images: 99 are trained on, in batches of 50 and 49."""
    return replace(mini, train=ImageSet(mini.train.images[:110], mini.train.labels[:110]))


@pytest.mark.parametrize(
    ("world", "expected"),
    [({}, [50]), ({"virtual_shards": 4}, [12] * 5 + [13] * 3), ({"virtual_shards": 32}, [2] * 35)],
)
def test_the_shards_of_a_whole_batch_are_compiled(
    world: dict[str, int], expected: list[int], mini: Dataset, tmp_path: Path, compiled_sizes: list[int]
) -> None:
    """By their size alone, which the number of ranks does not change; single images are not."""
    recipe = replace(SHORT, epochs=1, global_batch_size=50)
    run = compiled_run(recipe, few_of(mini), tmp_path / "run", replace(ALONE, **world))  # type: ignore[arg-type]
    with StopRequest() as stop:
        fit(run, stop)
    assert sorted(compiled_sizes) == sorted(expected)


def test_compiling_is_one_line_and_a_slow_phase(compiled_sizes: list[int]) -> None:
    """Others wait for a rank that compiles, which other processes do: its own is idle."""
    activity, lines = Activity(hang_timeout_s=0.5), list[str]()
    activity.timeout_s = 1.0
    network = CompiledNetwork(nn.Flatten(), [8], device=ALONE.device, activity=activity, log=lines.append)
    timeouts = []
    with activity.computing():
        for sizes, image_size in (((4,), None), ((8, 8), None), ((8,), None), ((8, 4), 24)):
            with network.step(sizes, image_size):
                timeouts.append((activity.timeout_s, activity._is_computing))
            with activity.collective():
                """Restores the timeout."""
    idle, waiting = (SLOW_PHASE_TIMEOUT_S, False), (1.0, True)
    assert timeouts == [waiting, idle, waiting, idle]
    assert len(lines) == 2
    assert all(re.fullmatch(r"--compile: compiling took \d+\.\d s, for 8 images at a time", line) for line in lines)
    assert compiled_sizes == []


@pytest.mark.minutes  # imports the compiler
def test_a_failure_to_compile_is_one_line(compiled_sizes: list[int]) -> None:
    from torch._dynamo.exc import TorchRuntimeError

    network = CompiledNetwork(nn.Flatten(), [8], device=ALONE.device, activity=Activity(), log=print)
    message = r"^--compile: torch.compile fails: no such kernel; leave --compile out$"
    with pytest.raises(ConfigError, match=message), network.step((8,), None):
        raise TorchRuntimeError("\nno such kernel\nand a long explanation")


def test_a_run_continues_as_it_began(mini: Dataset, tmp_path: Path) -> None:
    """Compiled steps round differently. The digests of runs without stay as they were."""
    for began, message in ((True, "compiled: continue with --compile"), (False, "not compiled: continue without")):
        config = TrainConfig(run_dir=tmp_path / str(began), compile=began)
        folder = RunFolder.plan(config, SHORT, mini, ALONE)
        assert ("compiled" in folder.fingerprint.values, folder.fingerprint.is_compiled) == (began, began)
        folder.enter("auto", ALONE)
        other = RunFolder.plan(replace(config, compile=not began), SHORT, mini, ALONE)
        assert other.fingerprint.sha256 != folder.fingerprint.sha256
        with pytest.raises(ConfigError, match=f"this run's steps are {message}"):
            other.enter("auto", ALONE)


@pytest.mark.minutes
@pytest.mark.parametrize("name", ["mnist-fast", "mnist-alexnet", "cifar10"])  # Muon; dropout; two kinds of steps
def test_what_is_compiled_computes_the_same(
    name: str, mini: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's own kernels in the traced graphs, to the bit: momenta, statistics and dropped units are right."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward, **_: real(forward, backend="aot_eager", dynamic=False))
    recipe = replace(RECIPES[name], dataset="mnist-mini", epochs=2, global_batch_size=50, precision="float32")
    recipe = replace(recipe, widths=(4, 4, 8)) if name == "cifar10" else recipe
    digests = []
    for folder in ("compiled", "plain"):
        run = compiled_run(recipe, few_of(mini), tmp_path / folder)
        if folder == "plain":
            monkeypatch.setattr(CompiledNetwork, "forward", lambda self, pixels: self.network(pixels))
        with StopRequest() as stop:
            fit(run, stop)
        digests.append(weights_sha256(run.learner.model))
    assert digests[0] == digests[1]


@pytest.mark.minutes
def test_a_command_compiles_and_says_what_it_costs(tmp_path: Path, data_dir: Path, mini: Dataset) -> None:
    command = [sys.executable, "trainer/main.py", "--dataset", "mnist-mini", "--data-dir", str(data_dir)]
    command += ["--epochs", "1", "--device", "cpu", "--no-export", "--precision", "float32", "--compile"]

    def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*command, *arguments],
            cwd=ROOT,
            env={**clean_environment(), **environment},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    done = run("--run-dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert re.search(r"^--compile: compiling took \d+\.\d s, for 100 images at a time$", done.stdout, re.MULTILINE)
    assert '"compiled": true' in (tmp_path / "run" / "config.json").read_text()
    done = run("--run-dir", str(tmp_path / "none"), PATH=str(tmp_path), CXX="no-such-compiler")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: --compile: on a CPU torch.compile needs a C++ compiler, and there is none: install g++, or leave "
        "--compile out"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_passes_are_part_of_the_graph(
    mini: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = torch.device("cuda", 0)
    world = World(rank=0, size=1, local_rank=0, device=device, num_threads=1)
    few = replace(mini, train=ImageSet(mini.train.images[:1100], mini.train.labels[:1100]))
    # With the recipe's rate of 0.1, weights that differ by 1e-6 differ by 0.02 after these 20 steps; now by 2e-5.
    slow = {name: replace(group, lr=0.01) for name, group in SHORT.param_groups.items()}
    weights = []
    for is_compiled in (True, False):
        run = compiled_run(
            replace(SHORT, param_groups=slow), few, tmp_path / str(is_compiled), world, is_compiled=is_compiled
        )
        with StopRequest() as stop:
            fit(run, stop)
        weights.append([parameter.detach().cpu() for parameter in run.learner.model.parameters()])
    printed = capsys.readouterr().out
    assert printed.count("--compile: compiling took") == 1
    assert "no CUDA graph" not in printed
    for mine, theirs in zip(*weights, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)
