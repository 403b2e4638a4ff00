"""The command line: parses options, runs the command, and turns failures into one line and an exit code."""

import atexit
import errno
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn, TypeVar

import trainer.ranks.launcher  # noqa: F401 (records the parent process before torch is imported, which takes seconds)
from convoy.printable import printable
from convoy.processes import exit_on_ctrl_c, restore_ctrl_c
from convoy.verbs import Verb, run_verb
from trainer.collector import lasting_imports
from trainer.errors import ConfigError, Interrupted, PeerError, TrainerError, UserCodeError
from trainer.ranks.environment import RankEnvironment
from trainer.signals import StopRequest

if TYPE_CHECKING:
    from trainer.config_file import CommandLine

# Set before torch is loaded: its warnings of lost connections are C++ stack traces, and our own line is enough.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

T = TypeVar("T")

_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a write, which do not name the file."""

_NO_MEMORY = re.compile(
    r"CUDA out of memory|DefaultCPUAllocator: (can't allocate|not enough) memory"
    r"|Storage size calculation overflowed|Overflow when unpacking long"  # of a size
)
"""In the texts of torch's errors, which are RuntimeErrors."""

LINGER_S = 1.5
"""Wait of a silent rank before it exits: torchrun kills all ranks when the first one exits, and the rank that prints
the cause needs time to do so."""


def train_command(arguments: Sequence[str], prog: str = "trainer/main.py") -> NoReturn:
    """Trains one run."""
    from trainer.config import TrainConfig

    line = read_command_line(arguments)
    config = parse(TrainConfig, line.arguments, prog=prog, default=line.default)
    with lasting_imports():
        from trainer.train import train  # imports torch, which --help and a faulty command line need not wait for

    run_command(lambda: train(line.combine(config)))


def evaluate_command(arguments: Sequence[str], prog: str) -> NoReturn:
    """Evaluates a finished run."""
    from trainer.config import EvaluateConfig

    config = parse(EvaluateConfig, arguments, prog=prog)
    with lasting_imports():
        from trainer.reopen import evaluate_run  # imports torch, which --help and a faulty line need not wait for

    run_command(lambda: evaluate_run(config))


def export_command(arguments: Sequence[str], prog: str) -> NoReturn:
    """Exports a finished run."""
    from trainer.config import ExportConfig

    config = parse(ExportConfig, arguments, prog=prog)
    with lasting_imports():
        from trainer.reopen import export_run  # imports torch, which --help and a faulty line need not wait for

    run_command(lambda: export_run(config))


def compare_command(arguments: Sequence[str], prog: str) -> NoReturn:
    """Compares finished runs."""
    from trainer.config import CompareConfig

    config = parse(CompareConfig, arguments, prog=prog)
    from trainer.compare import compare_runs

    run_command(lambda: print("\n".join(compare_runs(config.runs))))


def watch_command(arguments: Sequence[str], prog: str) -> NoReturn:
    """Follows runs while other processes train them."""
    from trainer.watch import WatchConfig, watch_runs

    config = parse(WatchConfig, arguments, prog=prog)
    run_command(lambda: watch_runs(config))


def study_command(arguments: Sequence[str], prog: str) -> int:
    """Runs one of the studies; also under torchrun."""
    from trainer.studies import STUDIES, load_study

    def verb(name: str, summary: str) -> Verb:
        def run(rest: Sequence[str]) -> NoReturn:
            with lasting_imports():
                options, study = load_study(name)
            config = parse(options, rest, prog=f"{prog} {name}")
            run_command(lambda: study(config))

        return Verb(summary, run)

    return run_verb(prog, {name: verb(name, summary) for name, summary in STUDIES.items()}, arguments, kind="study")


def recipes_command(arguments: Sequence[str], prog: str) -> int:
    """Prints one line for each recipe, or all fields of one."""
    from trainer.recipes import RECIPES

    if len(arguments) == 1 and not arguments[0].startswith("-"):
        run_command(lambda: _print_recipe(arguments[0]))
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: {prog} [RECIPE]\n\nLists what can be trained, or all fields of a recipe, for --set FIELD=VALUE.")
        return 0
    if arguments:
        print(f"error: {prog} takes the name of one recipe and no options: see {prog} --help", file=sys.stderr)
        return 2
    width = max(map(len, RECIPES))
    for recipe in RECIPES.values():
        print(f"{recipe.name:{width}s}  {recipe.summary}")
    return 0


def _print_recipe(reference: str) -> None:
    from trainer.recipes.fields import describe_recipe
    from trainer.recipes.files import load_recipe

    print("\n".join(describe_recipe(load_recipe(reference))))


def data_command(arguments: Sequence[str], prog: str) -> NoReturn:
    """Runs `data list|fetch|verify|import`."""
    from trainer.data.commands import run

    def command() -> int:
        with StopRequest():  # removes partial downloads
            return run(arguments, prog)

    run_command(command)


COMMANDS: dict[str, Callable[[Sequence[str], str], int | None]] = {
    "train": train_command,
    "evaluate": evaluate_command,
    "export": export_command,
    "watch": watch_command,
    "compare": compare_command,
    "study": study_command,
    "recipes": recipes_command,
    "data": data_command,
}


def read_command_line(arguments: Sequence[str]) -> "CommandLine":
    """Reads the file that the command line of a training names with `--config`. A faulty file ends the process."""
    from trainer.config_file import CommandLine

    try:
        return CommandLine.read(arguments)
    except ConfigError as error:
        if _environment().is_main:
            _report(error)
        else:
            time.sleep(LINGER_S)
        sys.exit(error.exit_code)


def parse(kind: type[T], arguments: Sequence[str], *, prog: str, default: T | None = None) -> T:
    """Parses the command line into a dataclass.

    A faulty command line, or `--help`, ends the process. Under torchrun only rank 0 prints.

    Args:
        default: has the values of options that the command line does not give.
    """
    is_main = _environment().is_main
    from convoy.options import parse_options

    try:
        parsed: T = parse_options(kind, arguments, prog=prog, default=default, prints=is_main)
        return parsed
    except SystemExit:
        if not is_main:
            time.sleep(LINGER_S)
        raise


def run_command(command: Callable[[], int | None]) -> NoReturn:
    """Runs a command and exits with the code that it returns; reports a failure in one line.

    Under torchrun every rank runs the same command, and only the rank that failed first reports.
    """
    environment = _environment()
    restore_ctrl_c()
    try:
        _exit(command() or 0)
    except Interrupted as error:
        if environment.is_main:
            print(error, file=sys.stderr)
        _exit(128 + error.signal_number)
    except PeerError as error:
        time.sleep(LINGER_S)
        _exit(error.exit_code)
    except TrainerError as error:
        _report(error)
        _exit(error.exit_code)
    except KeyboardInterrupt:
        _exit(128 + signal.SIGINT)
    except BrokenPipeError:
        raise  # standard output cannot be written: `whole_command` handles it
    except Exception as error:
        if (explained := _explain(error)) is not None:
            _report(explained)
            _exit(explained.exit_code)
        if environment.has_error_file:
            _record_for_torchrun(error)
        traceback.print_exc()
        _exit(1)


def _explain(error: Exception) -> TrainerError | None:
    """Returns the error that an exception stands for which is about a file or about memory; None for a defect."""
    if isinstance(error, OSError) and error.filename is not None:
        return TrainerError(f"{error.filename}: {error.strerror}")
    if isinstance(error, OSError) and error.errno in _FULL:
        return TrainerError(error.strerror)
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        first_line = str(error).partition("\n")[0].rpartition("DefaultCPUAllocator: ")[2]
        return ConfigError(
            f"not enough memory: ask for a smaller batch, smaller images or a smaller network ({first_line})"
        )
    return None


def _report(error: TrainerError) -> None:
    """Prints an error in one line, whatever is in the names of files; one of the user's own code in its lines."""
    text = str(error) if isinstance(error, UserCodeError) else printable(str(error))
    print(f"error: {text}", file=sys.stderr)


def _exit(code: int) -> NoReturn:
    """Ends the process.

    A rank that failed skips what `atexit` knows, too: other ranks may be gone, for which a library would wait. No rank
    may see Python's own teardown, which `whole_command` skips: gloo's threads may still hold the last reference to a
    tensor then, and aborted the process in one exit out of six ("terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if _environment().world_size > 1 and code:
        os._exit(code)
    atexit.register(exit_on_ctrl_c)  # the command has ended: Ctrl-C in the teardown of libraries shows no stack
    sys.exit(code)


def _environment() -> RankEnvironment:
    """Returns which rank this process is; ends a process whose variables contradict each other.

    That process reports it itself: it may be any rank, or none.
    """
    try:
        return RankEnvironment.read()
    except ConfigError as error:
        _report(error)
        sys.exit(error.exit_code)


def _record_for_torchrun(error: Exception) -> None:
    """Writes the error where torchrun reads it, so that torchrun's summary names it."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)
