"""The command line of the server: `python -m serving --model-repository models`."""

import os
import signal
import sys
from collections.abc import Sequence

from convoy.processes import whole_command
from serving.errors import StartupError

EXIT_CANNOT_START = 2


def main(arguments: Sequence[str], *, prog: str = "python -m serving") -> int:
    """Serves until SIGTERM or SIGINT.

    Returns:
        The exit code: 0 after a drain, 2 if the server cannot start; it then prints one line. If requests are still
        running when the grace period is over, the process exits with code 1 before this returns.
    """
    # As process 1 of a container, a process ignores signals that it does not handle. There is nothing to drain yet.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    from convoy.options import parse_options
    from serving.config import ServeConfig

    # gRPC's core reads this once. Its own lines on standard error would break JSON logs.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # OpenMP reads this once, too. Its threads would spin between two batches and take CPU time from the front ends.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    config: ServeConfig = parse_options(ServeConfig, arguments, prog=prog)
    from serving.observability.logging import report_startup_error, set_up_logging

    set_up_logging(config.log_format)
    try:
        if config.workers > 1:
            from serving.workers.supervisor import supervise

            return supervise(config)
        from serving.server import serve

        serve(config)
    except StartupError as error:
        report_startup_error(error, config.log_format)
        return EXIT_CANNOT_START
    return 0


if __name__ == "__main__":
    with whole_command():
        sys.exit(main(sys.argv[1:]))
