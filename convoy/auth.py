"""The bearer tokens of a server's clients, and what each of them may do. Knows no protocol."""

import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from convoy.credentials import CredentialFiles
from convoy.quotas import Quota
from convoy.token_lines import Rates, parse_token_lines

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
"""How often the tokens of calls that stay open are looked at."""


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller that has shown a token.

    Args:
        scopes: what the token permits.
        quota: shared by all tokens of this name; None if it has none.
    """

    name: str
    scopes: frozenset[str]
    quota: Quota | None = None


class TokenFile:
    """The tokens of which clients must send one as `authorization: Bearer TOKEN`. Thread-safe.

    Changes of the file take effect within a second. A file that is deleted ends its tokens; one that cannot be used
    keeps them for `convoy.credentials.KEEP_S`. Memory holds only digests of the tokens.

    Args:
        path: of a file in the format of `convoy.token_lines`.
        scopes: all scopes that a token may have.

    Raises:
        CredentialError: the file cannot be read, or is invalid.
    """

    def __init__(self, path: Path, scopes: Sequence[str]) -> None:
        self._path = path
        self._scopes = frozenset(scopes)
        self._key = os.urandom(32)  # of the digests: without it, the time of a comparison tells nothing about a token
        self._quotas: dict[tuple[str, Rates], Quota] = {}
        self._file = CredentialFiles([path], lambda contents: self._parse(contents[0]), revoke=_without_tokens)
        self._open_calls = _OpenCalls()
        if path.stat().st_mode & stat.S_IROTH:
            logger.warning("token file %s can be read by every user of this machine", path)

    def find(self, header: str | None) -> Principal | None:
        """Returns the principal of the token in an `authorization` header; None if it holds no valid one."""
        return self._file.get().principals.get(self._digest_of(header))

    @contextmanager
    def watch(self, header: str | None, end: Callable[[], None]) -> Iterator[None]:
        """Context of a call that stays open: calls `end` once its token is revoked, or has another name or scopes.

        Args:
            header: the call's `authorization`, which was valid when the call began.
            end: called once at most, on another thread, within two seconds; must not block.
        """
        digest = self._digest_of(header)

        def rights() -> tuple[str, frozenset[str]] | None:
            principal = self._file.get().principals.get(digest)
            return None if principal is None else (principal.name, principal.scopes)

        given = rights()
        with self._open_calls.add(lambda: given is not None and rights() == given, end):
            yield

    def lists(self, scope: str) -> bool:
        """Returns whether a line names the scope; lines that hold nothing but a token do not count."""
        return scope in self._file.get().listed_scopes

    def _digest_of(self, header: str | None) -> bytes:
        """Returns the digest of the token in an `authorization` header; an empty one if it holds none."""
        scheme, _, token = (header or "").partition(" ")
        return self._digest(token.strip()) if scheme.lower() == "bearer" else b""

    def _digest(self, token: str) -> bytes:
        return blake2b(token.encode("utf-8", "backslashreplace"), key=self._key).digest()

    def _parse(self, content: bytes) -> "_Tokens":
        try:
            lines = parse_token_lines(content, self._scopes)
        except ValueError as error:
            raise ValueError(f"token file {self._path}: {error}") from error
        # A principal whose quotas have not changed keeps the state of its buckets.
        limited = {(line.name, line.rates) for line in lines if line.rates != (None, None)}
        self._quotas = {key: self._quotas.get(key) or Quota(*key[1]) for key in limited}
        principals = {
            self._digest(line.token): Principal(
                line.name, line.scopes or self._scopes, self._quotas.get((line.name, line.rates))
            )
            for line in lines
        }
        return _Tokens(principals, frozenset().union(*(line.scopes for line in lines if line.scopes)))


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The content of a token file.

    Args:
        principals: by digest of the token.
        listed_scopes: all that a line names.
    """

    principals: dict[bytes, Principal]
    listed_scopes: frozenset[str]


def _without_tokens(tokens: _Tokens) -> _Tokens:
    return replace(tokens, principals={})


class _OpenCalls:
    """The calls that stay open, each with a test of its token. Thread-safe.

    A thread makes the tests; while no call is open there is none.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[object, tuple[Callable[[], bool], Callable[[], None]]] = {}
        self._is_looking = False

    @contextmanager
    def add(self, is_valid: Callable[[], bool], end: Callable[[], None]) -> Iterator[None]:
        key = object()
        with self._lock:
            self._calls[key] = is_valid, end
            if not self._is_looking:
                self._is_looking = True
                threading.Thread(target=self._look, name="open-calls", daemon=True).start()
        try:
            yield
        finally:
            self._take(key)

    def _take(self, key: object) -> bool:
        with self._lock:
            return self._calls.pop(key, None) is not None

    def _look(self) -> None:
        while calls := self._wait_and_list():
            for key, (is_valid, end) in calls:
                try:
                    if not is_valid() and self._take(key):
                        end()
                except Exception:  # the other calls are looked at, too
                    logger.exception("a call could not be ended whose token is no longer valid")

    def _wait_and_list(self) -> list[tuple[object, tuple[Callable[[], bool], Callable[[], None]]]]:
        time.sleep(LOOK_EVERY_S)
        with self._lock:
            self._is_looking = bool(self._calls)
            return list(self._calls.items())
