"""The model repository: folders in Triton's layout that hold a model's versions.

    <name>/config.pbtxt        inputs, outputs and how to serve them; written once, then left to the user
    <name>/labels.txt          the classes, one a line
    <name>/<version>/          complete as soon as it appears, by one rename

This module knows nothing about training and conversion.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from convoy.images import SIGNIFICANT_BITS
from convoy.named_files import read_regular
from convoy.preprocessing import Method
from convoy.promotion import Promotion, PromotionError, read_promotion
from protos.model_config_pb2 import TYPE_FP32, TYPE_UINT8, DataType, ModelConfig, ModelInput, ModelOutput
from trainer.errors import ConfigError, ExportError
from trainer.files import flush_to_disk
from trainer.paths import check_model_name
from trainer.permissions import why_not_writable

INPUT, LOGITS, PROBABILITIES = "images", "logits", "probabilities"
CONFIG, LABELS, ONNX = "config.pbtxt", "labels.txt", "model.onnx"
GOLDEN, MANIFEST = "golden.npz", "manifest.json"
_STAGING = ".staging-"
_STALE_S = 3600.0
"""Age from which a folder of unfinished files is that of a killed process, where the file system has no locks."""
_UNLOCKED_S = 60.0
"""Age from which a folder that nobody locks is. On some network disks, other hosts do not see a lock."""
MAX_BATCH_SIZE = 256
_MAX_PIXELS = 1 << 21
"""Of the largest batch, which a server runs when it loads a model. For EfficientNet-Lite0 on 224 x 224 pixels, 256
images take 2.6 GB and 21 s of CPU time, and 32 of them 0.4 GB and 3 s; each image costs no more."""


def largest_batch(image_shape: tuple[int, int, int]) -> int:
    """Returns the number of images in the largest batch that is checked and served, a power of two up to 256.

    Args:
        image_shape: channels, height, width.
    """
    _, height, width = image_shape
    return min(MAX_BATCH_SIZE, 1 << max(0, (_MAX_PIXELS // (height * width)).bit_length() - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryModel:
    """A model of the repository: the properties that all its versions share.

    Args:
        repository: the folder; created when the first version is published.
        name: letters, digits, `_`, `-` and `.`.
        image_shape: channels, height, width.
        labels: the classes in order.
        significant_bits: bits that the 16-bit files of the training used; None without such files.
        preprocessing: how images are prepared for the model.

    Raises:
        ConfigError: the name is not valid.
    """

    repository: Path
    name: str
    image_shape: tuple[int, int, int]
    labels: tuple[str, ...]
    significant_bits: int | None = None
    preprocessing: Method = "fit"

    def __post_init__(self) -> None:
        check_model_name(self.name)

    @property
    def path(self) -> Path:
        """The model's folder."""
        return self.repository / self.name

    def config(self) -> ModelConfig:
        """Returns Triton's configuration of the model."""
        config = ModelConfig(
            name=self.name,
            platform="onnxruntime_onnx",
            backend="onnxruntime",
            default_model_filename=ONNX,
            max_batch_size=largest_batch(self.image_shape),
            input=[ModelInput(name=INPUT, data_type=TYPE_UINT8, dims=self.image_shape)],
            output=[
                ModelOutput(name=name, data_type=TYPE_FP32, dims=[len(self.labels)], label_filename=LABELS)
                for name in (LOGITS, PROBABILITIES)
            ],
        )
        config.dynamic_batching.SetInParent()
        if self.significant_bits not in (None, 16):
            config.parameters[SIGNIFICANT_BITS].string_value = str(self.significant_bits)
        return config

    def check(self) -> None:
        """Checks that a version can be published, without writing anything.

        Raises:
            ConfigError: a model with this name exists and has other classes, inputs or outputs.
            ExportError: the repository cannot be written.
        """
        with self._export_errors():
            nearest = next(folder for folder in (self.path, *self.path.parents) if folder.exists())
            if not nearest.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, f"{nearest} is not a folder")
            if reason := why_not_writable(self.path):
                raise PermissionError(errno.EACCES, reason)
            if (self.path / LABELS).exists():
                self._check_labels()
            if (self.path / CONFIG).exists():
                self._check_config()

    def publish(self, files: dict[str, bytes], build_manifest: Callable[[int], bytes]) -> Path:
        """Publishes files as the next version. Processes that publish at the same time get a version each.

        Args:
            files: the content of each file by its name.
            build_manifest: returns the content of `manifest.json` for a version number.

        Returns:
            The version's folder.

        Raises:
            ConfigError: a model with this name exists and has other classes, inputs or outputs.
            ExportError: the repository cannot be written. No partial version is left.
        """
        with self._export_errors():
            self.path.mkdir(parents=True, exist_ok=True)
            _remove_stale(self.path)
            self._write_if_absent(LABELS, "".join(f"{label}\n" for label in self.labels))
            self._check_labels()
            self._write_if_absent(CONFIG, text_format.MessageToString(self.config()))
            self._check_config()
            with _staging_folder(self.path) as staged:
                for name, content in files.items():
                    _write(staged / name, content)
                version = 1 + max(self._versions(), default=0)
                _write(staged / MANIFEST, build_manifest(version))
                while not _rename(staged, self.path / str(version)):
                    version = 1 + max(self._versions())
                    _write(staged / MANIFEST, build_manifest(version))
            flush_to_disk(self.path)
            return self.path / str(version)

    def serving(self) -> int | None:
        """Returns the version that a new one would replace; None if there is none.

        That is the newest one, unless an operator has chosen an older one (see `convoy.promotion`).
        """
        versions, promotion = self._versions() if self.path.is_dir() else [], self._promotion()
        order = promotion.order(versions) if promotion is not None else []
        return next((version for version in order if version in versions), max(versions, default=None))

    def pinned(self) -> int | None:
        """Returns the version that an operator has pinned, which a newer one does not replace; None for none."""
        promotion = self._promotion()
        return promotion.version if promotion is not None and promotion.pinned else None

    def _promotion(self) -> Promotion | None:
        try:
            return read_promotion(self.path)
        except (OSError, PromotionError):  # the server says so
            return None

    def _versions(self) -> list[int]:
        return [int(path.name) for path in self.path.iterdir() if path.name.isascii() and path.name.isdecimal()]

    def _write_if_absent(self, name: str, text: str) -> None:
        """Writes one of the model's files unless it exists. It appears complete and never replaces another."""
        if (self.path / name).exists():
            return
        with _staging_folder(self.path) as staged:
            _write(staged / name, text.encode())
            with contextlib.suppress(FileExistsError):
                os.link(staged / name, self.path / name)

    def _check_labels(self) -> None:
        path = self.path / LABELS
        known = read_regular(path).decode(errors="replace").splitlines()
        if len(known) != len(self.labels):
            self._raise_incompatible(f"{path} has {len(known)} classes, the new version {len(self.labels)}")
        for index, (theirs, ours) in enumerate(zip(known, self.labels, strict=True)):
            if theirs != ours:
                self._raise_incompatible(f"class {index} is {theirs!r} in {path} and {ours!r} in the new version")

    def _check_config(self) -> None:
        path = self.path / CONFIG
        try:
            known = text_format.Parse(read_regular(path).decode(), ModelConfig(), allow_unknown_field=True)
        except (text_format.ParseError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read as a Triton configuration: {error}") from error
        for kind, theirs, ours in (
            ("input", known.input, self.config().input),
            ("output", known.output, self.config().output),
        ):
            if (there := _describe_tensors(theirs)) != (here := _describe_tensors(ours)):
                self._raise_incompatible(f"{path} has {kind} {there}, the new version {here}")
        bits = known.parameters[SIGNIFICANT_BITS].string_value if SIGNIFICANT_BITS in known.parameters else "16"
        if self.significant_bits is not None and bits != str(self.significant_bits):
            self._raise_incompatible(
                f"16-bit images have {bits} {SIGNIFICANT_BITS} in {path} and {self.significant_bits} in the new version"
            )

    def _raise_incompatible(self, difference: str) -> None:
        raise ConfigError(f"{difference}: choose another --name or --model-repository")

    @contextlib.contextmanager
    def _export_errors(self) -> Iterator[None]:
        """Raises ExportError in place of an OSError."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise ExportError(f"cannot write to the model repository {self.repository}: {reason}") from error


def find_version(model: Path, weights_sha256: str, *, run: str | None = None) -> Path | None:
    """Returns the newest version of a model, in the folder `model`, with these weights; None if there is none.

    Args:
        run: the name of the run folder that it must be from.
    """
    versions = (path for path in model.glob("*/") if path.name.isascii() and path.name.isdecimal())
    for version in sorted(versions, key=lambda path: int(path.name), reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not a version of ours
            origin = json.loads(read_regular(version / MANIFEST))["origin"]
            if origin["weights_sha256"] == weights_sha256 and (run is None or origin["run"] == run):
                return version
    return None


def _describe_tensors(described: Any) -> str:
    """Returns names, types and shapes as one line."""
    parts = sorted((tensor.name, DataType.Name(tensor.data_type), [*tensor.dims]) for tensor in described)
    return ", ".join(f"{name} {kind} {dims}" for name, kind, dims in parts) or "none"


def _remove_stale(folder: Path) -> None:
    """Removes the unfinished files of killed processes."""
    for staged in folder.glob(f"{_STAGING}*"):
        with contextlib.suppress(OSError), _locked(staged) as is_locked:
            stale_s = _UNLOCKED_S if is_locked else _STALE_S
            if is_locked is not None and time.time() - staged.stat().st_mtime > stale_s:
                shutil.rmtree(staged, ignore_errors=True)


@contextlib.contextmanager
def _locked(staged: Path) -> Iterator[bool | None]:
    """Context that locks a folder, if no other process does. The kernel releases the lock when its holder dies.

    Returns:
        A context manager that yields whether the file system has locks; None if another process holds this one.
    """
    descriptor = os.open(staged, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _staging_folder(folder: Path) -> Iterator[Path]:
    """Creates a hidden folder, locks it, and removes it at the end unless it was renamed."""
    staged = folder / f"{_STAGING}{os.getpid()}-{secrets.token_hex(4)}"
    staged.mkdir()  # not by tempfile, whose folders only their owner may read
    try:
        with _locked(staged):
            yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _rename(staged: Path, version: Path) -> bool:
    """Makes the folder the version. Returns False if that version exists."""
    flush_to_disk(staged)
    try:
        staged.rename(version)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise
    return True
