"""Files of credentials that are read when a process starts, and again when they change.

Kubernetes swaps a symbolic link when it rotates a secret, and people edit files in place. The files are small: at most
once a second, the thread that needs their value reads them. A check has one of three results: the files are there, one
is gone, or they cannot be used (unreadable, or invalid). Each change of the result is logged once.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

CHECK_INTERVAL_S = 1.0
"""Pause between two checks of the files."""
KEEP_S = 300.0
"""How long a value that may be revoked outlives files that cannot be used: time to mend them, and a bound."""

_GONE = (FileNotFoundError, NotADirectoryError)


class CredentialError(Exception):
    """A credential file cannot be used; `str` is one line for the operator."""


class CredentialFiles(Generic[Value]):
    """The value of the last usable content of some files. Thread-safe.

    Args:
        parse: returns the value of the files' contents; raises OSError, or ValueError with a message of one line.
        revoke: returns the value in place of an earlier one whose files are gone, or unusable for `KEEP_S`; None to
            keep the last value for ever.

    Raises:
        CredentialError: the files cannot be used.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        parse: Callable[[list[bytes]], Value],
        *,
        revoke: Callable[[Value], Value] | None = None,
    ) -> None:
        self._paths = paths
        self._parse = parse
        self._revoke = revoke
        self._lock = threading.Lock()
        self._failing_since: float | None = None
        self._is_revoked = False
        self._reported = ""
        try:
            contents = self._read()
            self._value, self._digest = parse(contents), _digest(contents)
        except (OSError, ValueError) as error:
            raise CredentialError(_one_line(error)) from error
        can_change = all(path.is_file() for path in paths)  # a pipe can be read only once
        self._next_check = time.monotonic() + CHECK_INTERVAL_S if can_change else math.inf

    def get(self) -> Value:
        """Returns the value."""
        if time.monotonic() >= self._next_check and self._lock.acquire(blocking=False):
            try:
                self._check()
            finally:
                self._lock.release()
        return self._value

    def _check(self) -> None:
        now = time.monotonic()
        self._next_check = now + CHECK_INTERVAL_S
        try:
            contents = self._read()
            digest = _digest(contents)
            if digest == self._digest and self._failing_since is None:
                return
            value = self._parse(contents)
        except (OSError, ValueError) as error:
            self._fail(error, now)
            return
        self._value, self._digest = value, digest
        self._failing_since, self._is_revoked, self._reported = None, False, ""
        logger.info("reloaded %s", ", ".join(map(str, self._paths)))

    def _fail(self, error: OSError | ValueError, now: float) -> None:
        if self._failing_since is None:
            self._failing_since = now
        reason = _one_line(error)
        if self._revoke is None:
            self._report(f"{reason}; the previous content stays in use")
        elif isinstance(error, _GONE) or now - self._failing_since >= KEEP_S:
            if not self._is_revoked:
                self._value, self._is_revoked = self._revoke(self._value), True
            self._report(f"{reason}; what it held is no longer accepted")
        elif not self._is_revoked:
            self._report(f"{reason}; the previous content stays in use for {KEEP_S:g} s at most")

    def _report(self, message: str) -> None:
        if message != self._reported:
            self._reported = message
            logger.warning("%s", message)

    def _read(self) -> list[bytes]:
        try:
            return [path.read_bytes() for path in self._paths]
        except _GONE:  # perhaps the old target of a symbolic link that was swapped: look again
            return [path.read_bytes() for path in self._paths]


def _digest(contents: list[bytes]) -> list[bytes]:
    """Returns what tells two contents apart, and does not keep secrets in memory."""
    return [sha256(content).digest() for content in contents]


def _one_line(error: OSError | ValueError) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot read {error.filename}: {error.strerror}"
    return str(error)
