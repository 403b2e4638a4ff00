"""Loads objects from Python files that the user names on the command line, such as `my_net.py:MyNet`.

The file is run, as `python my_net.py` would run it; modules beside it can be imported. Its digest covers the files
beside it that it imports by `import` statements, directly or not; installed packages have versions of their own, and
belong to no digest. Imports no torch.
"""

import ast
import functools
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convoy.named_files import read_file
from trainer.errors import ConfigError, TrainerError, UserCodeError, unknown_name

_OURS = ("convoy", "trainer")
"""Packages whose code a run's record knows anyway."""


def is_reference(text: str) -> bool:
    """Returns whether a text names a Python file, with or without an object of it: `my_net.py:MyNet`, `my_net.py`."""
    return text.endswith(".py") or ".py:" in text


def load_object(reference: str) -> tuple[Any, str]:
    """Loads an object from a Python file. The same content is run only once.

    Args:
        reference: FILE.py:NAME; NAME may have dots.

    Returns:
        The object, and the SHA-256 of `sources_sha256`, which belongs to the identity of a run.

    Raises:
        ConfigError: there is no such file or object, or the file cannot be run; the message names file and line.
    """
    path, name = split_reference(reference)
    source, sha256 = _read(path), sources_sha256(path)
    found: Any = _run_file(path.absolute(), source, sha256)
    for part in name.split("."):
        if not hasattr(found, part):
            public = [known for known in vars(found) if not known.startswith("_")] if hasattr(found, "__dict__") else []
            raise ConfigError(f"{path}: {unknown_name('object', part, public)}")
        found = getattr(found, part)
    return found, sha256


def sources_sha256(path: Path) -> str:
    """Returns the SHA-256 of a Python file; together with those beside it that it imports, if there are any.

    Raises:
        ConfigError: a file cannot be read.
    """
    source, others = _read(path), imported_beside(path)
    if not others:
        return hashlib.sha256(source).hexdigest()
    digest = hashlib.sha256()
    for file in (path.absolute(), *others):
        digest.update(f"{file.relative_to(path.absolute().parent).as_posix()}\0".encode() + _read(file) + b"\0")
    return digest.hexdigest()


def imported_beside(path: Path) -> list[Path]:
    """Returns the files in a Python file's folder, or in packages there, that it imports, directly or not.

    Raises:
        ConfigError: a file cannot be read.
    """
    folder = path.absolute().parent
    found: dict[Path, None] = {path.absolute(): None}
    waiting = [path.absolute()]
    while waiting:
        file = waiting.pop()
        for name in _imported_names(file, folder):
            new = [module for module in _modules_of(name, folder) if module not in found]
            found.update(dict.fromkeys(new))
            waiting += new
    return sorted(file for file in found if file != path.absolute())


def _imported_names(file: Path, folder: Path) -> Iterator[str]:
    """Yields the dotted names that a file imports, as they are seen from a folder above it."""
    try:
        tree = ast.parse(_read(file))
    except (SyntaxError, ValueError):  # running the file will tell
        return
    package = file.parent.relative_to(folder).parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            outer = package[: len(package) - node.level + 1] if node.level else ()
            parts = [*outer, *([node.module] if node.module else [])]
            yield from (".".join([*parts, alias.name]) for alias in node.names)


def _modules_of(name: str, folder: Path) -> Iterator[Path]:
    """Yields the files in a folder that an import of a dotted name runs."""
    parts = name.split(".")
    if parts[0] in _OURS:
        return
    for number in range(1, len(parts) + 1):
        base = folder.joinpath(*parts[:number])
        for file in (base / "__init__.py", base.with_name(f"{base.name}.py")):
            if file.is_file():
                yield file
                break


def _read(path: Path) -> bytes:
    try:
        return read_file(path.expanduser())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None


@contextmanager
def user_errors(reference: str) -> Iterator[None]:
    """Context for calls of what `load_object` returned: an error becomes lines that name the user's file and line.

    Raises:
        ConfigError: the user's code failed.
    """
    path, _ = split_reference(reference)
    try:
        yield
    except TrainerError:
        raise
    except (Exception, SystemExit) as error:
        raise UserCodeError(_describe(path.absolute(), error)) from error


def describe_if_in(reference: str, error: Exception) -> str | None:
    """Returns an error in one line with the user's file and line, or None if the user's code has no part in it.

    Args:
        reference: of the user's code, which consists of its file and those beside it that it imports.
    """
    line = line_in(reference, error)
    return None if line is None else f"{line}: {_in_one_line(error)}"


def line_in(reference: str, error: BaseException) -> str | None:
    """Returns the user's file and line that an error went through last, or None if the user's code has no part in it.

    Args:
        reference: as in `describe_if_in`.
    """
    path, _ = split_reference(reference)
    files = {str(file) for file in (path.absolute(), *imported_beside(path))}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    return f"{frames[-1].filename}, line {frames[-1].lineno}, in {frames[-1].name}" if frames else None


def split_reference(reference: str) -> tuple[Path, str]:
    """Returns the file and the object that a reference names.

    Raises:
        ConfigError: it names no file, or no object of it.
    """
    path, _, name = reference.rpartition(":")
    if not path.endswith(".py") or not name:
        example = reference if reference.endswith(".py") else "my_file.py"
        raise ConfigError(f"{reference}: name a file and an object of it, such as {example}:NAME")
    return Path(path).expanduser(), name


@functools.cache
def _run_file(path: Path, source: bytes, sha256: str) -> Any:
    """Returns the module that a file's content defines. Later imports find it by its name, as pickle and others do."""
    name = f"{path.stem}_{sha256[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last, so that no file beside it hides a module of ours
    sys.modules[name] = module
    try:
        exec(compile(source, path, "exec"), module.__dict__)  # these bytes: the file may change after the digest
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserCodeError(_describe(path, error)) from error
    return module


def _describe(path: Path, error: BaseException) -> str:
    """Returns an error of the user's code: what it is, and the lines of the user's file that led to it."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    text = _in_one_line(error)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if not frames:
        return f"{path}: {text}"
    calls = "".join(f"\n  {path}, line {frame.lineno}, in {frame.name}: {frame.line}" for frame in frames[:-1][-2:])
    return f"{path}, line {frames[-1].lineno}, in {frames[-1].name}: {text}\n  {frames[-1].line}" + (
        f"\ncalled from{calls}" if calls else ""
    )


def _in_one_line(error: BaseException) -> str:
    return " ".join("".join(traceback.format_exception_only(error)).split())
