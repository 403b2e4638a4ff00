"""Checks, before any work, that this process may write where it will."""

import os
from pathlib import Path


def why_not_writable(path: Path) -> str | None:
    """Returns why this process may not create `path` or write in it, or None if it may.

    Looks at permissions only: that a folder is a file, or a disk full, is for the writer to find.
    """
    nearest = next(folder for folder in (path, *path.absolute().parents) if os.path.exists(folder))
    if not nearest.is_dir() or os.access(nearest, os.W_OK | os.X_OK):
        return None
    return (
        f"{nearest} is not writable for uid {os.geteuid()}: change its owner or mode (on Kubernetes the volume ignores "
        "fsGroup: deploy/README.md)"
    )
