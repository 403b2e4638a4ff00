"""The origin of a run or a study: code, number of ranks and machine."""

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from trainer.hardware import describe
from trainer.ranks.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Facts that a reader of a result needs and that decide no result.

    Args:
        git_commit: see `git_commit`.
        machine: from `hardware.describe`.
    """

    git_commit: str | None
    world_size: int
    machine: dict[str, str | int]

    @classmethod
    def here(cls, world: World) -> Self:
        """Returns the origin of what this process starts."""
        return cls(git_commit=git_commit(), world_size=world.size, machine=describe(world.device))


def git_commit() -> str | None:
    """Returns the commit of this code, with a + if files differ from it, or None outside of a checkout."""
    try:
        command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
