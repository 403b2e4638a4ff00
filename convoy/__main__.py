"""`convoy VERB …` and `python -m convoy VERB …`."""

import sys
from typing import NoReturn

from convoy.processes import whole_command


def main() -> NoReturn:
    """Runs the command line of this process, and exits with its code."""
    with whole_command():
        from convoy.cli import run

        sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
