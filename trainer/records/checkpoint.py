"""Checkpoints: complete or absent, verified before use, the newest good one found by itself.

    checkpoints/step-00000550/state.pt        plain tensors and numbers, readable with weights_only
    checkpoints/step-00000550/manifest.json   step, and the SHA-256 of state.pt

A checkpoint is written under a temporary name in the same folder, flushed to the disk, and renamed; while training goes
on, by a thread of its own (`CheckpointWriter`). Each process has its own name: a rank whose launcher was killed may
still write when the run has begun again.
"""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.errors import CheckpointError
from trainer.files import flush_to_disk, save_tensors, sha256_of_file, write_json

NUM_KEPT = 3


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: made when the first one is saved.
        say: takes one line for the user.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._say = say
        self.newest_good_step: int | None = None
        """Of the checkpoint that was saved or loaded last."""

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Keep `state` (tensors, numbers, strings, in lists and dicts) as the checkpoint of `step`.

        Raises:
            CheckpointError: it could not be written; earlier ones are untouched.
        """
        final = self._folder / f"step-{step:08d}"
        temporary = self._folder / f".{final.name}.{socket.gethostname()}.{os.getpid()}.tmp"
        try:
            for left in self._folder.glob(
                ".step-*.tmp"
            ):  # by who was killed, or will leave, for this run has come after
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir(parents=True)
            with (temporary / "state.pt").open("wb") as file:
                save_tensors(state, file)
            digest = sha256_of_file(temporary / "state.pt")
            flush_to_disk(temporary / "state.pt")
            write_json(temporary / "manifest.json", {"step": step, "sha256": digest})
            if final.exists():  # a damaged one that was passed over
                shutil.rmtree(final)
            temporary.rename(final)
            flush_to_disk(self._folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"cannot save a checkpoint in {self._folder}: {error.strerror or error}") from error
        self.newest_good_step = step
        # Those of later steps were damaged and passed over, or come from before the run began again.
        kept = [path for path in self._complete() if path <= final][-NUM_KEPT:]
        for path in reversed(self._complete()):
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def load_newest(self) -> dict[str, Any] | None:
        """The newest state that is whole, or None where there is none. Damaged ones are passed over with a warning."""
        for path in reversed(self._complete()):
            try:
                manifest = json.loads((path / "manifest.json").read_text())
                if sha256_of_file(path / "state.pt") != manifest["sha256"]:
                    raise ValueError("its content does not match its digest")
                state: dict[str, Any] = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
                self.newest_good_step = int(state["step"])
                return state
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                self._say(f"warning: checkpoint {path} is damaged and passed over: {error}")
        return None

    def newest(self) -> Path | None:
        """The newest checkpoint, not verified."""
        return next(reversed(self._complete()), None)

    def _complete(self) -> list[Path]:
        return sorted(path for path in self._folder.glob("step-*") if path.is_dir())


class CheckpointWriter:
    """Saves beside the training, one checkpoint at a time: only the copy of the state is made on the calling thread."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._writing: Future[None] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written. None may be begun then."""
        return self._writing is not None and not self._writing.done()

    def begin(self, step: int, state: dict[str, Any]) -> None:
        """Copy `state` and have it written. How that went is told by `finish`."""
        assert self._writing is None
        self._writing = self._pool.submit(self._checkpoints.save, step, _copy(state))

    def finish(self) -> None:
        """Wait until the checkpoint that was begun is written, if there is one.

        Raises:
            CheckpointError: it could not be.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        self._pool.shutdown()


def _copy(state: Any) -> Any:
    """The same with tensors of its own, on the CPU."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: _copy(value) for name, value in state.items()}
    return [_copy(value) for value in state] if isinstance(state, list) else state


def weights_sha256(model: nn.Module) -> str:
    """The digest of a model's weights and buffers."""
    return state_sha256(model.state_dict())


def state_sha256(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 over each name of a state dict in sorted order, in UTF-8, and then its tensor's bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
