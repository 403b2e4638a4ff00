"""The model repository: folders in Triton's layout that hold versions, each whole or absent.

    <name>/config.pbtxt        inputs, outputs and how to serve them; written once, and the user's from then on
    <name>/labels.txt          the classes, one a line
    <name>/<version>/          appears by one rename

Knows nothing of how a model is made or what it answers.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from protos.model_config_pb2 import TYPE_FP32, TYPE_UINT8, DataType, ModelConfig, ModelInput, ModelOutput
from trainer.errors import ConfigError, ExportError
from trainer.files import flush_to_disk

INPUT, LOGITS, PROBABILITIES = "images", "logits", "probabilities"
CONFIG, LABELS, ONNX = "config.pbtxt", "labels.txt", "model.onnx"
GOLDEN, MANIFEST = "golden.npz", "manifest.json"
MAX_BATCH_SIZE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model of the repository: what all of its versions have in common.

    Args:
        repository: made when the first version is published.
        image_shape: channels, height, width.
        labels: the classes in their order.

    Raises:
        ConfigError: the name is none that can be served.
    """

    repository: Path
    name: str
    image_shape: tuple[int, int, int]
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            raise ConfigError(
                f"--name {self.name}: a model's name has letters, digits, '_', '-' and '.', and begins with one of the "
                "first two"
            )

    @property
    def path(self) -> Path:
        return self.repository / self.name

    def config(self) -> ModelConfig:
        """Triton's description of the model."""
        config = ModelConfig(
            name=self.name,
            platform="onnxruntime_onnx",
            backend="onnxruntime",
            default_model_filename=ONNX,
            max_batch_size=MAX_BATCH_SIZE,
            input=[ModelInput(name=INPUT, data_type=TYPE_UINT8, dims=self.image_shape)],
            output=[
                ModelOutput(name=name, data_type=TYPE_FP32, dims=[len(self.labels)], label_filename=LABELS)
                for name in (LOGITS, PROBABILITIES)
            ],
        )
        config.dynamic_batching.SetInParent()
        return config

    def check(self) -> None:
        """See whether a version could be published; only reads.

        Raises:
            ConfigError: a model with other classes, inputs or outputs has this name already.
            ExportError: the repository may not be written.
        """
        with self._explained():
            nearest = next(folder for folder in (self.path, *self.path.parents) if folder.exists())
            if not nearest.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, f"{nearest} is not a folder")
            if not os.access(nearest, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, f"no permission to write in {nearest}")
            if (self.path / LABELS).exists():
                self._check_labels()
            if (self.path / CONFIG).exists():
                self._check_config()

    def publish(self, files: dict[str, bytes], describe: Callable[[int], bytes]) -> Path:
        """Make the files the next version; two at once get two versions. Returns the version's folder.

        Args:
            files: content by name.
            describe: the content of `manifest.json`, for the version's number.

        Raises:
            ConfigError: as `check`.
            ExportError: the repository cannot be written; nothing half-written is left.
        """
        with self._explained():
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_once(LABELS, "".join(f"{label}\n" for label in self.labels))
            self._check_labels()
            self._write_once(CONFIG, text_format.MessageToString(self.config()))
            self._check_config()
            with _staging(self.path) as staged:
                for name, content in files.items():
                    _write(staged / name, content)
                version = 1 + max(self._versions(), default=0)
                _write(staged / MANIFEST, describe(version))
                while not _rename(staged, self.path / str(version)):
                    version = 1 + max(self._versions())
                    _write(staged / MANIFEST, describe(version))
            flush_to_disk(self.path)
            return self.path / str(version)

    def _versions(self) -> list[int]:
        return [int(path.name) for path in self.path.iterdir() if path.name.isascii() and path.name.isdecimal()]

    def _write_once(self, name: str, text: str) -> None:
        """Write a file of the model unless it is there; it appears whole, and never replaces another."""
        if (self.path / name).exists():
            return
        with _staging(self.path) as staged:
            _write(staged / name, text.encode())
            with contextlib.suppress(FileExistsError):
                os.link(staged / name, self.path / name)

    def _check_labels(self) -> None:
        path = self.path / LABELS
        known = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if len(known) != len(self.labels):
            self._refuse(f"{path} has {len(known)} classes, the new version {len(self.labels)}")
        for index, (theirs, ours) in enumerate(zip(known, self.labels, strict=True)):
            if theirs != ours:
                self._refuse(f"class {index} is {theirs!r} in {path} and {ours!r} in the new version")

    def _check_config(self) -> None:
        path = self.path / CONFIG
        try:
            known = text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig(), allow_unknown_field=True)
        except (text_format.ParseError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not in Triton's text format: {error}") from error
        for kind, theirs, ours in (
            ("input", known.input, self.config().input),
            ("output", known.output, self.config().output),
        ):
            if (there := _tensors(theirs)) != (here := _tensors(ours)):
                self._refuse(f"{path} has {kind} {there}, the new version {here}")

    def _refuse(self, difference: str) -> None:
        raise ConfigError(
            f"{difference}: take another --model-repository, or another name (python -m trainer export RUN --name NAME)"
        )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise ExportError(f"cannot publish in the model repository {self.repository}: {reason}") from error


def printable(name: str) -> str:
    """A class's name as a line: names of folders may hold anything, line ends and undecodable bytes included."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name)


def _tensors(described: Any) -> str:
    """Names, types and shapes, as a line."""
    parts = sorted((tensor.name, DataType.Name(tensor.data_type), [*tensor.dims]) for tensor in described)
    return ", ".join(f"{name} {kind} {dims}" for name, kind, dims in parts) or "none"


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A fresh hidden folder, gone at the end whatever happens (or by its own new name)."""
    staged = folder / f".staging-{os.getpid()}-{secrets.token_hex(4)}"
    staged.mkdir()  # not tempfile's 0700: others will read it
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _rename(staged: Path, version: Path) -> bool:
    """Whether the folder is the version now: false where another one is."""
    flush_to_disk(staged)
    try:
        staged.rename(version)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise
    return True
