"""`python -m trainer.service`: training as a service."""

import logging
import os
import sys
from collections.abc import Sequence

from convoy.extras import how_to_install
from convoy.printable import printable
from convoy.processes import whole_command


def main(arguments: Sequence[str], prog: str = "python -m trainer.service") -> int:
    """Serves until SIGTERM or Ctrl-C. Returns the exit code: 2 for a faulty command line, else 0."""
    from convoy.credentials import CredentialError
    from trainer.cli import parse
    from trainer.errors import TrainerError
    from trainer.service.settings import ServiceConfig

    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # a client's failed handshake is no line for the log
    config = parse(ServiceConfig, arguments, prog=prog)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    try:
        from trainer.service.server import serve

        return serve(config)
    except ModuleNotFoundError as error:
        print(f"error: the service needs {error.name}: {how_to_install('serving')}", file=sys.stderr)
    except (TrainerError, CredentialError, ValueError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    with whole_command():
        sys.exit(main(sys.argv[1:]))
