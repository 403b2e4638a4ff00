"""The edge to the user: command lines in, one clear line and an exit code out when something is wrong."""

import contextlib
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import trainer.ranks.launcher  # noqa: F401 (notes who started this process before torch is imported)
from convoy.processes import restore_ctrl_c
from trainer.errors import Interrupted, PeerError, TrainerError
from trainer.signals import StopRequest

# Before torch is loaded: its warnings of lost connections are C++ stacks, and the line that we say is enough.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

T = TypeVar("T")

LINGER_S = 1.5
"""How long a rank with nothing to say waits before it leaves: torchrun ends all ranks when the first one leaves, and
the one that tells the user why must not be cut short."""


def train_command(arguments: Sequence[str]) -> NoReturn:
    """`trainer/main.py`: one training run."""
    from trainer.config import TrainConfig  # imports torch, which a faulty command line need not wait for twice
    from trainer.train import train

    config = parse(TrainConfig, arguments, prog="trainer/main.py")
    run_command(lambda: train(config))


def evaluate_command(arguments: Sequence[str]) -> NoReturn:
    """`python -m trainer evaluate RUN`."""
    from trainer.config import EvaluateConfig
    from trainer.reopen import evaluate_run

    config = parse(EvaluateConfig, arguments, prog="python -m trainer evaluate")
    run_command(lambda: evaluate_run(config))


def export_command(arguments: Sequence[str]) -> NoReturn:
    """`python -m trainer export RUN`."""
    from trainer.config import ExportConfig
    from trainer.reopen import export_run

    config = parse(ExportConfig, arguments, prog="python -m trainer export")
    run_command(lambda: export_run(config))


def compare_command(arguments: Sequence[str]) -> NoReturn:
    """`python -m trainer compare RUN…`."""
    from trainer.compare import compare_runs
    from trainer.config import CompareConfig

    config = parse(CompareConfig, arguments, prog="python -m trainer compare")
    run_command(lambda: print("\n".join(compare_runs(config.runs))))


def study_command(arguments: Sequence[str]) -> NoReturn:
    """`python -m trainer study NAME`; also under torchrun."""
    from trainer.errors import unknown_name
    from trainer.studies import STUDIES

    if not arguments or arguments[0] in ("-h", "--help"):
        lines = (f"  {name:12s} {study.summary}" for name, study in STUDIES.items())
        print("usage: python -m trainer study NAME [OPTIONS]\n\n" + "\n".join(lines))
        sys.exit(0 if arguments else 2)
    name, rest = arguments[0], arguments[1:]
    if name not in STUDIES:
        print(f"error: {unknown_name('study', name, STUDIES)}", file=sys.stderr)
        sys.exit(2)
    study = STUDIES[name]
    config = parse(study.config, rest, prog=f"python -m trainer study {name}")
    run_command(lambda: study.run(config))


def recipes_command(arguments: Sequence[str]) -> None:
    """`python -m trainer recipes`: one line for each."""
    from trainer.recipes import RECIPES

    if arguments:
        print("usage: python -m trainer recipes\n\nList what can be trained.")
        sys.exit(0 if arguments[0] in ("-h", "--help") else 2)
    for recipe in RECIPES.values():
        print(f"{recipe.name:18s} {recipe.summary}")


def data_command(arguments: Sequence[str]) -> NoReturn:
    """`python -m trainer data list|fetch|verify|import`."""
    from trainer.data.commands import run

    def command() -> int:
        with StopRequest():  # what was fetched in part is taken away
            return run(arguments)

    run_command(command)


def parse(kind: type[T], arguments: Sequence[str], *, prog: str) -> T:
    """The command line as a value. A faulty one, or `--help`, ends the process; under torchrun only rank 0 speaks."""
    import tyro

    silence = contextlib.nullcontext() if _is_main() else contextlib.redirect_stdout(io.StringIO())
    try:
        with silence, contextlib.redirect_stderr(sys.stderr if _is_main() else io.StringIO()):
            return tyro.cli(kind, args=arguments, prog=prog)
    except SystemExit:
        if not _is_main():
            time.sleep(LINGER_S)
        raise


def run_command(command: Callable[[], int | None]) -> NoReturn:
    """Run a command and end the process with the exit code that it returns; turn a failure into what a user should see.

    Under torchrun the same command runs on every rank, and the first rank that fails is the one that speaks.
    """
    restore_ctrl_c()
    try:
        _leave(command() or 0)
    except Interrupted as error:
        if _is_main():
            print(error, file=sys.stderr)
        _leave(128 + error.signal_number)
    except PeerError as error:
        time.sleep(LINGER_S)
        _leave(error.exit_code)
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        _leave(error.exit_code)
    except KeyboardInterrupt:
        _leave(128 + signal.SIGINT)
    except BrokenPipeError:
        raise  # our output cannot be written: `exit_on_broken_pipe` knows what to do
    except Exception as error:
        _tell_torchrun(error)
        traceback.print_exc()
        _leave(1)


def _leave(code: int) -> NoReturn:
    """End the process.

    A rank does so without tearing Python down: gloo's threads may hold the last reference to a Python tensor a moment
    longer, and aborted the process then in one exit out of six ("terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    sys.exit(code)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _tell_torchrun(error: Exception) -> None:
    """Leave the error where torchrun looks for it, so that its own summary names it too."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
