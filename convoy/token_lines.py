"""The format of token files: one token a line, with the name of its principal, its scopes, and its quotas.

    # comment
    5f3c9a... name=alice scopes=infer,admin
    b81e07... name=batch scopes=infer requests_per_second=100 bytes_per_second=10M

A line that holds nothing but a token is the principal `default` with all scopes. Two lines with one name are two tokens
of one principal, as during a rotation. Numbers may end with k, M, G, Ki, Mi or Gi.

Errors name lines and quote nothing, because any word may be a misplaced token.
"""

import re
from collections.abc import Iterator, Set
from dataclasses import dataclass, field

DEFAULT_NAME = "default"

_RATES = ("requests_per_second", "bytes_per_second")
_KEYS = ("name", "scopes", *_RATES)
_TOKEN = re.compile(r"[!-~]+")  # printable ASCII without spaces
_NAME = re.compile(r"[A-Za-z0-9._@/:-]{1,64}")  # names are written to logs
_NUMBER = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)([kMG]|[KMG]i)?")
_FACTORS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}

Rates = tuple[float | None, float | None]
"""Requests and bytes a second; None for no limit."""


@dataclass(frozen=True, slots=True)
class TokenLine:
    """One token.

    Args:
        scopes: what the token permits; None for a line that holds nothing but a token.
    """

    token: str = field(repr=False)
    name: str = DEFAULT_NAME
    scopes: frozenset[str] | None = None
    rates: Rates = (None, None)


def is_token(text: str) -> bool:
    """Returns whether a text may be a token."""
    return _TOKEN.fullmatch(text) is not None


def parse_token_lines(content: bytes, scopes: Set[str]) -> list[TokenLine]:
    """Returns the tokens of a file.

    Args:
        scopes: all scopes that a token may have.

    Raises:
        ValueError: the content is invalid.
    """
    lines: dict[str, TokenLine] = {}
    rates: dict[str, Rates] = {}
    for where, words in _split(content):
        line = _parse_line(where, words, scopes)
        if line.token in lines:
            raise ValueError(f"{where}: this token is in an earlier line already")
        if rates.setdefault(line.name, line.rates) != line.rates:
            raise ValueError(f"{where}: all lines of one name must have the same quotas")
        lines[line.token] = line
    if not lines:
        raise ValueError("it is empty: expected a line with a token")
    return list(lines.values())


def _split(content: bytes) -> Iterator[tuple[str, list[str]]]:
    """Yields each line's number, in words, and its words. Skips empty lines and comments."""
    for number, text in enumerate(content.decode("utf-8-sig", "replace").splitlines(), start=1):
        words = text.split()
        if words and not words[0].startswith("#"):
            yield f"line {number}", words


def _parse_line(where: str, words: list[str], scopes: Set[str]) -> TokenLine:
    token, options = words[0], dict(word.partition("=")[::2] for word in words[1:])
    if not _TOKEN.fullmatch(token) or token.startswith(tuple(f"{key}=" for key in _KEYS)):
        raise ValueError(f"{where}: expected a token of printable ASCII characters first")
    if len(words) == 1:
        return TokenLine(token)
    if not options.keys() <= set(_KEYS) or len(options) < len(words) - 1:
        raise ValueError(f"{where}: after the token, expected {', '.join(f'{key}=…' for key in _KEYS)}, each once")
    if not {"name", "scopes"} <= options.keys():
        raise ValueError(f"{where}: a token that is followed by anything needs name=… and scopes=…")
    if not _NAME.fullmatch(options["name"]):
        raise ValueError(f"{where}: name= must be followed by 1 to 64 letters, digits or characters of ._@/:-")
    listed = frozenset(options["scopes"].split(","))
    if not listed <= scopes:
        raise ValueError(f"{where}: scopes= must be followed by some of {','.join(sorted(scopes))}")
    requests, size = (_parse_rate(where, options.get(key)) for key in _RATES)
    return TokenLine(token, options["name"], listed, (requests, size))


def _parse_rate(where: str, text: str | None) -> float | None:
    if text is None:
        return None
    match = _NUMBER.fullmatch(text)
    rate = float(match[1]) * _FACTORS[match[2] or ""] if match else 0.0
    if rate <= 0:
        raise ValueError(f"{where}: quotas must be positive numbers, such as 0.5, 100, 64k or 10Mi")
    return rate
