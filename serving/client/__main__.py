"""The client's command line: `python -m serving.client VERB …`."""

import os
import sys

from convoy.processes import exit_on_broken_pipe

if __name__ == "__main__":
    with exit_on_broken_pipe():
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # the client reports errors itself, in one line
        from serving.client.cli import main

        main(sys.argv[1:])
