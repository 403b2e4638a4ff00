"""Which version of a model serves, if its operator has said so: `serving.json` in the model's folder of a repository.

    promote   a version serves until a newer one is exported
    roll back the version that served before serves, until a newer one is exported
    pin       a version serves, whatever is exported, until it is unpinned

The file is written by one rename. Without it, the model's version policy decides alone. No folder is moved.
"""

import contextlib
import json
import os
import secrets
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from convoy.json_errors import describe_json_error

PROMOTION_FILE = "serving.json"
FORMAT_VERSION = 1
_MAX_HISTORY = 32
_MAX_BYTES = 64 * 1024


class PromotionError(ValueError):
    """The change is not possible, or the file is invalid. The message is one sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """The operator's choice.

    Args:
        version: serves.
        newest_known: the newest version when the choice was made. A newer one takes over, unless `pinned`.
        pinned: newer versions do not take over.
        history: the versions that served before, the last one last.
        rolled_back_from: the version that a roll-back took out of service; 0 if the choice was none.
        time: when the choice was made, ISO 8601.
    """

    version: int
    newest_known: int
    pinned: bool = False
    history: tuple[int, ...] = ()
    rolled_back_from: int = 0
    time: str = ""

    def order(self, present: Iterable[int]) -> list[int]:
        """Returns the versions to try, the best first: newer ones, this one, and older ones if this one fails."""
        if self.pinned:
            return [self.version]
        ordered = sorted(present, reverse=True)
        newer = [version for version in ordered if version > max(self.newest_known, self.version)]
        return [*newer, self.version, *(version for version in ordered if version < self.version)]

    def describe(self) -> str:
        """Returns the choice in words, for the log and the repository's index."""
        if self.pinned:
            return f"version {self.version} is pinned"
        if self.rolled_back_from:
            return f"rolled back from version {self.rolled_back_from} to version {self.version}"
        return f"version {self.version} is promoted"


def promote(current: Promotion | None, version: int, serving: int | None, present: Collection[int]) -> Promotion:
    """Returns the choice after `promote`.

    Args:
        serving: the version that requests get now; None for none.
        present: all versions.

    Raises:
        PromotionError: another version is pinned.
    """
    if current is not None and current.pinned and current.version != version:
        raise PromotionError(f"version {current.version} is pinned: unpin it first, or pin version {version} instead")
    if current is not None and current.pinned:
        return current
    return _chosen(current, version, serving, present, pinned=False)


def pin(current: Promotion | None, version: int, serving: int | None, present: Collection[int]) -> Promotion:
    """Returns the choice after `pin`. Arguments as for `promote`."""
    return _chosen(current, version, serving, present, pinned=True)


def unpin(current: Promotion | None) -> Promotion:
    """Returns the choice after `unpin`: the version serves on, unless a newer one was exported meanwhile.

    Raises:
        PromotionError: no version is pinned.
    """
    if current is None or not current.pinned:
        raise PromotionError("no version is pinned")
    return replace(current, pinned=False, time=_now())


def roll_back(current: Promotion | None, target: int, serving: int | None, present: Collection[int]) -> Promotion:
    """Returns the choice after a roll-back to one of `served_before`. A pin stays, of that version."""
    history = current.history if current is not None else ()
    if target in history:
        history = history[: len(history) - 1 - history[::-1].index(target)]
    elif current is not None and target != current.version:
        history = (*history, current.version) if target > current.newest_known else ()
    return Promotion(
        version=target,
        newest_known=max(present, default=target),
        pinned=current is not None and current.pinned,
        history=history,
        rolled_back_from=serving or 0,
        time=_now(),
    )


def served_before(current: Promotion | None, serving: int | None, present: Collection[int]) -> list[int]:
    """Returns the versions to roll back to, the best first: what served before as far as known, then older ones.

    If another version serves than the chosen one, and none that is newer, the chosen one does not load.
    """
    before: list[int] = []
    if current is not None:
        # A newer version takes over by itself: those in between may have served, too.
        if serving is not None and serving > current.newest_known:
            before += sorted((v for v in present if current.newest_known < v < serving), reverse=True)
        if serving is None or serving > current.newest_known:  # else the chosen one serves, or does not load
            before.append(current.version)
        history = current.history
        before += reversed(history[: history.index(serving)] if serving in history else history)
    before += sorted((v for v in present if serving is None or v < serving), reverse=True)
    return [version for version in dict.fromkeys(before) if version != serving and version in present]


def read_promotion(folder: Path) -> Promotion | None:
    """Returns the choice for the model in a folder; None if there is none.

    Raises:
        OSError: the file cannot be read.
        PromotionError: it is invalid.
    """
    try:
        with (folder / PROMOTION_FILE).open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return parse_promotion(content)


def parse_promotion(content: bytes) -> Promotion:
    """Returns the choice in a file's content.

    Raises:
        PromotionError: it is invalid.
    """
    try:
        document = json.loads(content)
        promotion = Promotion(
            version=_number(document["version"]),
            newest_known=_number(document["newest_known"]),
            pinned=document["pinned"] is True,
            history=tuple(_number(version) for version in document.get("history", [])),
            rolled_back_from=(document.get("rolled_back_from") and _number(document["rolled_back_from"])) or 0,
            time=str(document.get("time", "")),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PromotionError(f"{PROMOTION_FILE} cannot be read: {describe_json_error(error)}") from error
    if document.get("format_version") != FORMAT_VERSION:
        raise PromotionError(f"{PROMOTION_FILE} has format {document.get('format_version')}, not {FORMAT_VERSION}")
    return promotion


def to_bytes(promotion: Promotion) -> bytes:
    """Returns the file's content."""
    return (json.dumps({"format_version": FORMAT_VERSION, **asdict(promotion)}, indent=2) + "\n").encode()


def write_promotion(folder: Path, promotion: Promotion) -> None:
    """Writes the choice for the model in a folder, by one rename.

    Raises:
        OSError: the folder cannot be written.
    """
    staged = folder / f".{PROMOTION_FILE}.{secrets.token_hex(4)}"
    try:
        with staged.open("xb") as file:
            file.write(to_bytes(promotion))
            file.flush()
            os.fsync(file.fileno())
        staged.replace(folder / PROMOTION_FILE)
    except OSError:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)
        raise
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _chosen(
    current: Promotion | None, version: int, serving: int | None, present: Collection[int], *, pinned: bool
) -> Promotion:
    history = current.history if current is not None else ()
    if serving is not None and serving != version:
        history = (*(before for before in history if before != serving), serving)[-_MAX_HISTORY:]
    return Promotion(
        version=version,
        newest_known=max(present, default=version),
        pinned=pinned,
        history=tuple(before for before in history if before != version),
        time=_now(),
    )


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 10**18:
        raise ValueError(f"{value!r} is not the number of a version")
    return value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
