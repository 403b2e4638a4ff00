"""Reads lock files."""

import re
from pathlib import Path


def locked(path: Path) -> dict[str, set[str]]:
    """Returns the versions of each package; several where they depend on Python's version or the platform."""
    versions: dict[str, set[str]] = {}
    for package, version in re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==([\w.+]+)", path.read_text(), flags=re.MULTILINE):
        versions.setdefault(package, set()).add(version)
    return versions
