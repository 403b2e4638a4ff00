"""Engines run the processes of jobs. Others than Convoy's own are found by their entry point in `convoy.engines`."""

import importlib
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from convoy.extras import how_to_install
from trainer.errors import ConfigError
from trainer.service.engines.engine import Engine

GROUP = "convoy.engines"
_OURS = {
    "local": "trainer.service.engines.local:LocalEngine",
    "slurm": "trainer.service.engines.slurm:SlurmEngine",
    "kubernetes": "trainer.service.engines.kubernetes:KubernetesEngine",
}


def open_engine(name: str, folder: Path, after_end: Sequence[str] = ()) -> Engine:
    """Returns an engine.

    Args:
        folder: where it may keep files of jobs.
        after_end: a command that the engine runs, if it can, when an attempt has ended.

    Raises:
        ConfigError: it is not installed, or cannot be loaded.
    """
    targets = _targets()
    if name not in targets:
        raise ConfigError(f"--engine {name}: there are {', '.join(targets)}")
    module, _, kind = targets[name].partition(":")
    try:
        engine: Engine = getattr(importlib.import_module(module), kind)(folder, after_end)
    except ModuleNotFoundError as error:
        raise ConfigError(f"--engine {name} needs {error.name}: {how_to_install(name)}") from error
    except Exception as error:
        raise ConfigError(f"--engine {name} cannot be loaded: {error}") from error
    return engine


def _targets() -> dict[str, str]:
    return {**{point.name: point.value for point in entry_points(group=GROUP)}, **_OURS}
