"""How many files, sockets among them, this process may open."""

import resource

MAX_OPEN_FILES = 1 << 20
"""What an unlimited process counts with."""


def max_open_files() -> int:
    """Returns the soft limit, and at most `MAX_OPEN_FILES`."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else min(soft, MAX_OPEN_FILES)
