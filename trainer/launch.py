"""torchrun for hosts that may fail: `python -m trainer.launch OPTIONS SCRIPT …`, with torchrun's options and `PET_…`.

Differences from torchrun:

- It exits with the exit code of the first rank that failed, where torchrun always exits with 1. So Kubernetes or Slurm
  can tell a mistake in the configuration, which no retry repairs, from a lost host.
- Hosts with a fixed node rank first wait for each other at a barrier. Otherwise a host that is replaced before the
  others notice joins the store of a run that is about to end, and each then waits minutes for a host that has left.
- Hosts that wait for others print which ones, and the address.
- It passes on the signals that Slurm and other schedulers send before they end a job, and `nohup` holds.
- In an elastic run whose hosts have `PET_NODE_RANK`, host 0 has the rendezvous. torchrun compares names, and fails
  where a host's own name resolves late.
- Where a rank ends with one of the trainer's errors, whose line it has printed, torchrun adds no line of its own.
- Ranks that are all on one host need no name of it that resolves.
- It removes the temporary folder in which torchrun keeps the ranks' errors; one with the ranks' output stays.
- In every round of an elastic run, the host of rank 0 publishes the address of the store. torchrun publishes it in the
  first round only, so that a host that joins later never finds it, and after a minute all hosts give up (torch 2.15).
"""

import argparse
import datetime
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import NamedTuple, NoReturn

from convoy.processes import exit_immediately, exit_on_ctrl_c, restore_ctrl_c
from trainer.errors import TrainerError
from trainer.ranks.environment import warn_of_separate_tasks
from trainer.ranks.waiting import announced, name_numbers
from trainer.signals import handled_signals

if __name__ == "__main__":
    exit_on_ctrl_c()  # importing torch takes seconds, in which SIGTERM must end a container, too
    # Below this level torch, which reads the variable once, prints lost connections as C++ stacks. Not for the ranks.
    cpp_log_level = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ["TORCH_CPP_LOG_LEVEL"] = cpp_log_level or "FATAL"

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousInfo
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import config_from_args, get_rdzv_endpoint, parse_args, parse_min_max_nnodes, run

DEFAULT_PORT = 29500
"""torchrun's."""
SIGNALS_BY_DEFAULT = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"
"""torchrun's."""
BARRIER_TIMEOUT_S = 900
"""Longest wait of hosts for each other, unless `--rdzv-conf timeout=…` is given. It is longer than ranks wait for a
host that no longer answers (`SLOW_PHASE_TIMEOUT_S` in trainer/ranks/activity.py)."""
POLL_EVERY_S = 0.05
TORCHRUNS_LOG_OF_RANKS = "torch.distributed.elastic.multiprocessing.api"
STORE_INFO = "_bootstrap_store_info"
"""The private attribute in which torchrun keeps the address of the first round's store."""


class OptionError(Exception):
    """An option of torchrun has an impossible value."""


class HostBarrier(NamedTuple):
    """The barrier at which the hosts of a run with fixed node ranks wait for each other."""

    address: str
    port: int
    node_rank: int
    num_nodes: int
    timeout_s: int


def main(arguments: Sequence[str]) -> NoReturn:
    """Runs the ranks of this host to their end, and exits with the code of the first rank that failed."""
    try:
        args = parse_options(arguments)
        barrier = find_host_barrier(args)
    except OptionError as error:
        _exit(str(error), code=2)
    warning = warn_of_separate_tasks() if is_alone(args) else ""
    if warning:
        print(warning, file=sys.stderr, flush=True)
    pass_on_signals(args)
    logging.getLogger(TORCHRUNS_LOG_OF_RANKS).addFilter(is_news)
    choose_store_host(args)
    choose_own_address(args)
    # torchrun sets a handler later.
    signal.signal(signal.SIGTERM, exit_immediately)
    try:
        if barrier:
            with ThreadPoolExecutor(1) as pool:
                arrival = pool.submit(wait_for_hosts, barrier)  # in a thread: torch ignores Ctrl-C while it waits
                # In steps: a signal that arrives just before a wait is handled at the end of that wait.
                while not wait([arrival], timeout=POLL_EVERY_S).done:
                    pass
                arrival.result()
        restore_ctrl_c()
        announce_every_store(args)
        with log_folder(args) as args.log_dir:
            run(args)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(_shell_code(failure.exitcode))
    except SignalException as error:
        sys.exit(128 + error.sigval.value)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (dist.DistError, RendezvousError) as error:
        _exit(f"the hosts did not meet: {error}", code=1)
    except (ValueError, OSError) as error:  # such as a rendezvous backend, a folder or a program that does not exist
        _exit(str(error), code=1)
    sys.exit(0)


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns torchrun's options, checked as far as torchrun would only print a traceback.

    Raises:
        OptionError: an option or a `PET_…` variable has an impossible value.
    """
    try:
        args: argparse.Namespace = parse_args(arguments)
    except ValueError as error:  # a flag's variable; argparse itself exits
        raise OptionError(f"PET_STANDALONE and other variables for flags must be 0 or 1: {error}") from None
    try:
        min_nodes, max_nodes = parse_min_max_nnodes(args.nnodes)
    except (ValueError, RuntimeError):
        raise OptionError(f"--nnodes {args.nnodes}: must be a number of hosts, or MIN:MAX") from None
    if not 0 < min_nodes <= max_nodes:
        raise OptionError(f"--nnodes {args.nnodes}: must be at least 1, and MIN at most MAX")
    logging.disable(logging.WARNING)  # torchrun parses them again, and then warns
    try:
        config_from_args(argparse.Namespace(**{**vars(args), "log_dir": os.devnull}))  # without it, creates a folder
    except (ValueError, AssertionError) as error:
        raise OptionError(f"torchrun's options: {error}") from None
    finally:
        logging.disable(logging.NOTSET)
    return args


def is_alone(args: argparse.Namespace) -> bool:
    """Returns whether all ranks of the run are on this host."""
    _, max_nodes = parse_min_max_nnodes(args.nnodes)
    return bool(args.standalone) or max_nodes == 1


@contextmanager
def log_folder(args: argparse.Namespace) -> Iterator[str | None]:
    """Makes a context with torchrun's folder of logs: a temporary one if it holds nothing but the ranks' errors.

    With `--redirects` or `--tee`, it holds what the ranks print, and stays.
    """
    if args.log_dir or (args.redirects, args.tee) != ("0", "0"):
        yield args.log_dir
        return
    with tempfile.TemporaryDirectory(prefix="torchelastic_", ignore_cleanup_errors=True) as folder:
        yield folder


def pass_on_signals(args: argparse.Namespace) -> None:
    """Makes torchrun pass on every signal that the ranks handle, unless the user chose the signals.

    torchrun on its own would die of SIGUSR1, and of SIGHUP under `nohup`.
    """
    if args.signals_to_handle == SIGNALS_BY_DEFAULT:
        args.signals_to_handle = ",".join(number.name for number in (*handled_signals(), signal.SIGQUIT))


def is_news(record: logging.LogRecord) -> bool:
    """Returns whether torchrun logs more about its ranks than a rank's own line, or that it stops the others."""
    text = record.getMessage()
    codes = {error.exit_code for error in TrainerError.__subclasses__()} - {TrainerError.exit_code}
    return not text.startswith(("Sending process ", *(f"failed (exitcode: {code}) " for code in codes)))


def choose_store_host(args: argparse.Namespace) -> None:
    """Makes host 0 of an elastic run hold the rendezvous, if hosts have node ranks and no option chooses its host."""
    node_rank = os.environ.get("PET_NODE_RANK")
    if args.rdzv_backend != "c10d" or node_rank is None or is_alone(args):
        return
    args.node_rank = 0  # torchrun has no use for another one, and would warn
    if "is_host" not in args.rdzv_conf:
        args.rdzv_conf = ",".join(filter(None, (args.rdzv_conf, f"is_host={int(node_rank == '0')}")))


def choose_own_address(args: argparse.Namespace) -> None:
    """Makes ranks that are all on this host meet at its loopback address.

    torchrun takes the host's name, and waits without a word where that does not resolve.
    """
    if is_alone(args):
        args.local_addr = args.local_addr or "127.0.0.1"


def find_host_barrier(args: argparse.Namespace) -> HostBarrier | None:
    """Returns the barrier before torchrun's static rendezvous of several hosts; None for any other rendezvous.

    The barrier is a store of its own, at the port after torchrun's, which closes when all hosts have passed.

    Raises:
        OptionError: an option has an impossible value.
    """
    _, num_nodes = parse_min_max_nnodes(args.nnodes)
    if args.rdzv_backend != "static" or is_alone(args):
        return None
    if not 0 <= args.node_rank < num_nodes:
        raise OptionError(f"--node-rank {args.node_rank}: with --nnodes {args.nnodes} it must be 0 to {num_nodes - 1}")
    if not args.rdzv_endpoint:
        args.master_port = args.master_port or DEFAULT_PORT
    try:
        address, port = parse_rendezvous_endpoint(get_rdzv_endpoint(args), default_port=-1)
    except ValueError as error:
        raise OptionError(str(error)) from None
    if not 0 < port < 65535:
        raise OptionError(f"port {port}: must be 1 to 65534; the hosts meet at the next port, and then at this one")
    settings = dict(pair.strip().partition("=")[::2] for pair in args.rdzv_conf.split(","))
    timeout = settings.get("timeout", str(BARRIER_TIMEOUT_S))
    if not timeout.isdecimal():
        raise OptionError(f"--rdzv-conf timeout={timeout}: must be a whole number of seconds")
    return HostBarrier(address, port + 1, args.node_rank, num_nodes, int(timeout))


def wait_for_hosts(barrier: HostBarrier) -> None:
    """Returns when all hosts are at the barrier, and none has started its ranks.

    Raises:
        DistError: hosts are missing after the timeout.
    """
    until = time.monotonic() + barrier.timeout_s
    while True:
        try:
            _enter_barrier(barrier, timeout_s=max(1.0, until - time.monotonic()))
            return
        except dist.DistError:  # host 0 left while this one waited: its replacement opens another barrier
            if time.monotonic() >= until:
                raise


def _enter_barrier(barrier: HostBarrier, *, timeout_s: float) -> None:
    timeout = datetime.timedelta(seconds=timeout_s)
    is_host = barrier.node_rank == 0
    missing = list(range(1, barrier.num_nodes)) if is_host else [0]

    def describe() -> str:
        hosts = name_numbers("host", missing)
        where = f"{barrier.address}:{barrier.port}"
        return f"host {barrier.node_rank} waits for {hosts} of {barrier.num_nodes} at {where}" if missing else ""

    with announced(describe):
        store = TCPStore(barrier.address, barrier.port, is_master=is_host, timeout=timeout, wait_for_workers=False)
        if is_host:
            until = time.monotonic() + timeout_s
            while missing:
                if time.monotonic() > until:
                    raise dist.DistStoreError(f"{describe()}, and {timeout_s:.0f} s are over")
                missing[:] = [node for node in missing if not store.check([f"here/{node}"])]
                time.sleep(POLL_EVERY_S)
            store.set("go", "")
            store.wait([f"gone/{node}" for node in range(1, barrier.num_nodes)])
        else:
            missing.clear()  # host 0 tells the user which hosts are missing
            store.set(f"here/{barrier.node_rank}", "")
            store.wait(["go"])
            store.set(f"gone/{barrier.node_rank}", "")


def announce_every_store(args: argparse.Namespace) -> None:
    """Makes rank 0's host of an elastic run create a store and publish its address in every round.

    Patches torch, which then forgets the store of the last round. Also tells the user that this host waits for others.
    Prints a warning if torch has changed so that the patch does not fit.
    """
    if is_alone(args) or args.rdzv_backend == "static":
        return
    if not remembers_store():
        print(
            f"warning: trainer.launch does not know torch {torch.__version__}: "
            "a host that joins this run later may not find the others",
            file=sys.stderr,
        )
        return
    next_rendezvous = DynamicRendezvousHandler.next_rendezvous

    def next_rendezvous_with_new_store(self: DynamicRendezvousHandler) -> RendezvousInfo:
        setattr(self, STORE_INFO, None)
        with announced(lambda: f"this host waits for the others of {args.nnodes} hosts at {args.rdzv_endpoint}"):
            return next_rendezvous(self)

    DynamicRendezvousHandler.next_rendezvous = next_rendezvous_with_new_store  # type: ignore[method-assign]


def remembers_store() -> bool:
    """Returns whether this torch keeps the first round's store where `announce_every_store` expects it."""
    return STORE_INFO in DynamicRendezvousHandler.next_rendezvous.__code__.co_names


def _shell_code(code: int) -> int:
    """Converts the code of a process that a signal ended, negative in Python, to the 128 + number of shells."""
    return 128 - code if code < 0 else code


def _exit(message: str, *, code: int) -> NoReturn:
    first_line = message.splitlines()[0] if message else "unknown"
    print(f"error: {first_line}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    if cpp_log_level is None:
        del os.environ["TORCH_CPP_LOG_LEVEL"]
    main(sys.argv[1:])
