"""`python -m serving.client VERB …`: ask a server from the shell."""

import os
import sys

from convoy.processes import exit_on_broken_pipe

if __name__ == "__main__":
    with exit_on_broken_pipe():
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what goes wrong is told in one line, not by gRPC's core too
        from serving.client.cli import main

        main(sys.argv[1:])
