"""The client's command line: `python -m serving.client VERB …`."""

import os
import sys

from convoy.processes import whole_command

if __name__ == "__main__":
    with whole_command():
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # the client reports errors itself, in one line
        from serving.client.cli import main

        main(sys.argv[1:])
