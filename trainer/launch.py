"""torchrun that leaves with the exit code of the first rank that failed: `python -m trainer.launch OPTIONS SCRIPT …`.

torchrun itself leaves with 1 whatever went wrong. Who starts it on many hosts sees nothing but exit codes, and must
tell a mistake in the configuration, which no second try mends, from a lost host, which one does. The options and the
`PET_…` variables are torchrun's own.
"""

import sys
from collections.abc import Sequence
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main(arguments: Sequence[str]) -> NoReturn:
    """Run the ranks of this host to their end, and leave as the README's table of exit codes says."""
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(_shell_code(failure.exitcode))
    except SignalException as error:
        sys.exit(128 + error.sigval.value)
    except dist.DistError as error:
        print(f"error: the hosts did not meet: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


def _shell_code(code: int) -> int:
    """A process ended by a signal has a negative code in Python, and 128 + its number elsewhere."""
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    main(sys.argv[1:])
