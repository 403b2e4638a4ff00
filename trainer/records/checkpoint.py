"""Checkpoints: complete or absent, verified before use; a damaged one is skipped for the one before it.

    checkpoints/step-00000550/state.pt        plain tensors and numbers, readable with weights_only
    checkpoints/step-00000550/manifest.json   step, and the SHA-256 of state.pt

A checkpoint is written under a temporary name in the same folder, flushed to the disk, and renamed. The temporary name
is unique to the process: a rank whose launcher was killed may still write after the run has been started again.
"""

import errno
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convoy.named_files import read_regular
from trainer.errors import CheckpointError
from trainer.files import flush_to_disk, save_tensors, sha256_of_file, write_json

NUM_KEPT = 3
_DAMAGED = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO}
"""Errors of the checkpoint itself: a file is missing or is a folder, or the disk is bad."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: created with the first checkpoint.
        log: prints one line for the user.
        before_save: called before each save.
    """

    def __init__(
        self, folder: Path, log: Callable[[str], None], before_save: Callable[[], None] = lambda: None
    ) -> None:
        self._folder = folder
        self._log = log
        self._before_save = before_save
        self.newest_good_step: int | None = None
        """The step of the checkpoint that was saved or loaded last."""

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Saves `state` (tensors, numbers, strings, in lists and dicts) as the checkpoint of `step`.

        Raises:
            CheckpointError: it cannot be written; earlier checkpoints are untouched.
        """
        final = self._folder / f"step-{step:08d}"
        temporary = self._folder / f".{final.name}.{socket.gethostname()}.{os.getpid()}.tmp"
        try:
            self._before_save()
            for left in self._folder.glob(".step-*.tmp"):  # left by killed or superseded processes
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir(parents=True)
            with (temporary / "state.pt").open("wb") as file:
                save_tensors(state, file)
            digest = sha256_of_file(temporary / "state.pt")
            flush_to_disk(temporary / "state.pt")
            write_json(temporary / "manifest.json", {"step": step, "sha256": digest})
            if final.exists():  # a damaged one that was skipped
                shutil.rmtree(final)
            temporary.rename(final)
            flush_to_disk(self._folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"cannot save a checkpoint in {self._folder}: {error.strerror or error}") from error
        self.newest_good_step = step
        # Checkpoints of later steps were damaged and skipped, or are from before the run was restarted.
        kept = [path for path in self._complete() if path <= final][-NUM_KEPT:]
        for path in reversed(self._complete()):
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def load_newest(self) -> dict[str, Any] | None:
        """Returns the newest good state, or None if there is none. Skips damaged ones with a warning.

        Raises:
            CheckpointError: one cannot be read, although it may be good; a run without it would replace it.
        """
        tried: set[Path] = set()
        # Listed again after each: where another process trains the run, it adds new ones and removes old ones.
        while path := next((path for path in reversed(self._complete()) if path not in tried), None):
            tried.add(path)
            try:
                manifest = json.loads(read_regular(path / "manifest.json"))
                if sha256_of_file(path / "state.pt") != manifest["sha256"]:
                    raise ValueError("its content does not match its digest")
                state: dict[str, Any] = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
                self.newest_good_step = int(state["step"])
                return state
            except OSError as error:
                if not path.exists():
                    continue
                if error.errno not in _DAMAGED:
                    raise CheckpointError(
                        f"cannot read checkpoint {path}: {error.strerror or error}; make it readable, or move it away"
                    ) from error
                self._log(f"warning: checkpoint {path} is damaged and skipped: {error}")
            except (ValueError, KeyError, RuntimeError) as error:
                self._log(f"warning: checkpoint {path} is damaged and skipped: {error}")
        return None

    def newest(self) -> Path | None:
        """Returns the folder of the newest checkpoint, not verified, or None."""
        return next(reversed(self._complete()), None)

    def _complete(self) -> list[Path]:
        try:
            paths = list(self._folder.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"cannot read {self._folder}: {error.strerror or error}") from error
        return sorted(path for path in paths if path.name.startswith("step-") and path.is_dir())


def copy_to_cpu(state: Any) -> Any:
    """Returns a deep copy of a state with its tensors on the CPU, which later steps do not change."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: copy_to_cpu(value) for name, value in state.items()}
    return [copy_to_cpu(value) for value in state] if isinstance(state, list) else state


def weights_sha256(model: nn.Module) -> str:
    """Returns the digest of a model's weights and buffers."""
    return state_sha256(model.state_dict())


def state_sha256(state: dict[str, torch.Tensor]) -> str:
    """Returns the SHA-256 of each name of a state dict, sorted, in UTF-8, followed by its tensor's bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
