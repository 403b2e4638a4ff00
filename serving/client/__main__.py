"""`python -m serving.client VERB …`: ask a server from the shell."""

import os
import sys

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what goes wrong is told once, in one line, not by gRPC's core as well

from serving.client.cli import main

if __name__ == "__main__":
    main(sys.argv[1:])
