"""The bearer tokens of a server's clients, and what each of them may do. Knows no protocol."""

import logging
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from convoy.credentials import CredentialFiles
from convoy.quotas import Quota
from convoy.token_lines import Rates, parse_token_lines

logger = logging.getLogger(__name__)


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
        if path.stat().st_mode & stat.S_IROTH:
            logger.warning("token file %s can be read by every user of this machine", path)

    def find(self, header: str | None) -> Principal | None:
        """Returns the principal of the token in an `authorization` header; None if it holds no valid one."""
        principals = self._file.get().principals
        if header is None:
            return None
        scheme, _, token = header.partition(" ")
        return principals.get(self._digest(token.strip())) if scheme.lower() == "bearer" else None

    def lists(self, scope: str) -> bool:
        """Returns whether a line names the scope; lines that hold nothing but a token do not count."""
        return scope in self._file.get().listed_scopes

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
