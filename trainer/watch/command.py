"""The command line of `python -m trainer watch`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from convoy.extras import how_to_install
from convoy.options import check_port, option
from trainer.errors import ConfigError
from trainer.paths import run_folders
from trainer.watch.run import State, WatchedRun
from trainer.watch.terminal import follow_in_lines, follow_in_table


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchConfig:
    """Follows runs while they train, until all have ended; exits with 0 if all are finished, and else with 1."""

    runs: Annotated[list[Path], tyro.conf.Positional, option("RUN ...")]
    """Folders of runs, such as runs/*/. A study stands for its runs."""
    web: bool = False
    """Show them on a page on this machine, until Ctrl-C."""
    port: int = 8006
    """Port of the page; 0 for any that is free."""


def watch_runs(config: WatchConfig) -> int:
    """Runs `python -m trainer watch`.

    Raises:
        ConfigError: no folder is given, or one does not exist or holds no run; the page's port or packages are missing.
    """
    runs = [WatchedRun.open(folder) for path in config.runs for folder in run_folders(path)]
    if not runs:
        raise ConfigError("which runs? Give their folders, or all of them with runs/*/")
    if config.web:
        _serve(runs, config.port)
    elif sys.stdout.isatty():
        follow_in_table(runs)
    else:
        follow_in_lines(runs)
    return 0 if all(run.state is State.FINISHED for run in runs) else 1


def _serve(runs: list[WatchedRun], port: int) -> None:
    try:
        from trainer.watch.server import serve_runs
    except ModuleNotFoundError as error:
        raise ConfigError(f"--web needs the package {error.name}: {how_to_install('serving')}") from error
    try:
        check_port("--port", port)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    serve_runs(runs, port)
