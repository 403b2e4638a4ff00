"""torchrun for hosts that come and go: `python -m trainer.launch OPTIONS SCRIPT …`, with its options and `PET_…`.

It does three things that torchrun does not. It leaves with the exit code of the first rank that failed, where torchrun
leaves with 1 whatever went wrong: who starts hosts again must tell a mistake in the configuration, which no second try
mends, from a lost host, which one does. Hosts with a fixed node rank first meet in a lobby: without it, a host that
is replaced faster than the others notice joins the store of a run that is about to end, and each then waits for minutes
for somebody who has been there. And in an elastic run every round hears where its store is: torchrun says so in the
first only, so that a host that joins later waits in vain, and a minute after all hosts give up (seen with torch 2.15).
"""

import argparse
import datetime
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

from convoy.processes import exit_immediately, exit_on_ctrl_c, restore_ctrl_c

if __name__ == "__main__":
    exit_on_ctrl_c()  # importing torch takes seconds

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousInfo
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.run import parse_args, run

PATIENCE_S = 900.0
"""How long the others may take to come, unless `--rdzv-conf timeout=…` says: longer than ranks wait for a host that
vanished without a word (`PATIENT_S` in watchdog.py)."""


def main(arguments: Sequence[str]) -> NoReturn:
    """Run the ranks of this host to their end, and leave as the README's table of exit codes says."""
    args = parse_args(arguments)
    # The kernel keeps it from the first process of a container unless that listens; torchrun does once it runs.
    signal.signal(signal.SIGTERM, exit_immediately)
    try:
        with ThreadPoolExecutor(1) as lobby:
            lobby.submit(meet, args).result()  # in a thread: torch is deaf to Ctrl-C while it waits
        restore_ctrl_c()
        _announce_every_store()
        run(args)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(_shell_code(failure.exitcode))
    except SignalException as error:
        sys.exit(128 + error.sigval.value)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except dist.DistError as error:
        print(f"error: the hosts did not meet: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


def meet(args: argparse.Namespace) -> None:
    """Return when all hosts are here and none has begun, in torchrun's static rendezvous; at once in any other.

    The lobby is a store beside torchrun's own, one port further, and open only while hosts gather.

    Raises:
        DistError: they did not come.
    """
    if args.rdzv_backend != "static" or args.standalone or args.nnodes == "1":
        return
    settings = dict(pair.partition("=")[::2] for pair in args.rdzv_conf.split(","))
    until = time.monotonic() + float(settings.get("timeout", PATIENCE_S))
    while True:
        try:
            _enter_lobby(args, num_nodes=int(args.nnodes), left_s=until - time.monotonic())
            return
        except dist.DistError:  # host 0 went while we waited: its successor opens another lobby
            if time.monotonic() >= until:
                raise


def _enter_lobby(args: argparse.Namespace, *, num_nodes: int, left_s: float) -> None:
    timeout = datetime.timedelta(seconds=max(1.0, left_s))
    is_host = args.node_rank == 0
    address, port = args.master_addr, args.master_port + 1
    store = TCPStore(address, port, is_master=is_host, timeout=timeout, wait_for_workers=False)
    guests = range(1, num_nodes)
    if is_host:
        store.wait([f"here/{node}" for node in guests])
        store.set("go", "")
        store.wait([f"gone/{node}" for node in guests])
    else:
        store.set(f"here/{args.node_rank}", "")
        store.wait(["go"])
        store.set(f"gone/{args.node_rank}", "")


def _announce_every_store() -> None:
    """Let torchrun forget the last round's store: then rank 0's host makes a new one and says where, in every round."""
    next_rendezvous = DynamicRendezvousHandler.next_rendezvous

    def forgetful(self: DynamicRendezvousHandler) -> RendezvousInfo:
        self._bootstrap_store_info = None
        return next_rendezvous(self)

    DynamicRendezvousHandler.next_rendezvous = forgetful  # type: ignore[method-assign]


def _shell_code(code: int) -> int:
    """A process ended by a signal has a negative code in Python, and 128 + its number elsewhere."""
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    main(sys.argv[1:])
