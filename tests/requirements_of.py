"""Finds the packages that a test file needs and this machine lacks, without importing it.

A machine with a GPU may have torch, pytest and little else. There `pytest -m gpu` leaves out what cannot be imported,
and says so at its end.
"""

import ast
import functools
import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS = ("convoy", "protos", "serving", "tests", "trainer")


def missing_packages(path: Path) -> list[str]:
    """Returns the missing packages that a file, or one of our modules that it imports, imports when it is loaded.

    Args:
        path: a Python file below the repository.
    """
    seen: set[Path] = set()
    missing: set[str] = set()
    waiting = [path]
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        for name in _imports_of(file):
            package = name.partition(".")[0]
            if package in OURS:
                waiting += _files_of(name)
            elif not _is_installed(name):
                missing.add(name if _is_installed(package) else package)
    return sorted(missing)


@functools.cache
def _is_installed(name: str) -> bool:
    """Returns whether a module can be found; parents of a dotted name are imported."""
    if "." in name and name.partition(".")[0] != "google":  # `google` is a name of several packages
        return _is_installed(name.partition(".")[0])
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


@functools.cache
def _imports_of(file: Path) -> list[str]:
    """Returns the dotted names of what a module imports when it is loaded; of `from a import b` both a and a.b."""
    found: list[str] = []
    for statement in ast.parse(file.read_bytes()).body:
        match statement:
            case ast.Import(names=names):
                found += [each.name for each in names]
            case ast.ImportFrom(module=str() as module, names=names, level=0):
                found.append(module)
                if module.partition(".")[0] in OURS:
                    found += [f"{module}.{each.name}" for each in names]
    return found


def _files_of(name: str) -> list[Path]:
    """Returns the files of one of our modules, with those of the packages that it is in; none for another name."""
    parts = name.split(".")
    packages = [ROOT.joinpath(*parts[:number], "__init__.py") for number in range(1, len(parts) + 1)]
    return [file for file in (*packages, ROOT.joinpath(*parts).with_suffix(".py")) if file.is_file()]
