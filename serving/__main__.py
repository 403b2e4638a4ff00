"""`python -m serving --model-repository models`: the command line of the server."""

import os
import sys
from collections.abc import Sequence

from convoy.processes import exit_on_broken_pipe
from serving.errors import StartupError

EXIT_CANNOT_START = 2


def main(arguments: Sequence[str], *, prog: str = "python -m serving") -> int:
    """Serve until a signal comes. Returns the exit code: 0 after a drain, 2 if the server cannot start.

    Where a model computes on when the grace is over, the process ends by itself with 1.
    """
    import tyro

    from serving.config import ServeConfig

    # The core of gRPC writes lines of its own to standard error, which would break JSON logs; it reads this once.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # The threads of torch's OpenMP would spin between two batches and take the CPUs from the transport; read once too.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    config = tyro.cli(ServeConfig, args=arguments, prog=prog)
    try:
        from serving.observability.logging import set_up_logging
        from serving.server import serve

        set_up_logging(config.log_format)
        serve(config)
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CANNOT_START
    return 0


if __name__ == "__main__":
    with exit_on_broken_pipe():
        sys.exit(main(sys.argv[1:]))
