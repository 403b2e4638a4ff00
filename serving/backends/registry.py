"""Finds backends: each is an entry point of the group `convoy.backends`, ours as well as those of other packages.

A backend's package is imported when the first model needs it: a server of ONNX models never loads torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from serving.errors import LoadError
from serving.models.spec import ModelSpec
from serving.protocol.tensors import TensorSpec

GROUP = "convoy.backends"

Load = Callable[[Path, ModelSpec, int | None, int], Any]
"""Opens one instance: takes the model's file, its configuration, the index of the CUDA device (None for the CPU), and
the number of CPU threads that one batch may use. Returns an object with the method `run` of `Backend`, and `close` if
it has something to free."""

Describe = Callable[[Path], tuple[list[TensorSpec], list[TensorSpec]]]
"""Returns the inputs and outputs of a model's file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendType:
    """A backend. Other packages need not use this class: a module with `load` and `filename` is enough.

    Args:
        name: of the entry point.
        backend: the name in `config.pbtxt`, Triton's where Triton has such a backend.
        platform: Triton's older name; empty for none.
        filename: the model's file, if the configuration names none.
        runs_code: whether loading a model runs code from its folder.
        describe: None if the backend's files do not describe their tensors.
    """

    name: str
    backend: str
    platform: str = ""
    filename: str
    runs_code: bool = False
    load: Load
    describe: Describe | None = None


def _own(name: str, *, backend: str, platform: str, filename: str, runs_code: bool = False) -> BackendType:
    """Declares one of our backends, the module of this name beside this one, without importing it."""

    def module() -> Any:
        try:
            return import_module(f"serving.backends.{name}")
        except ImportError as error:
            raise LoadError(f"backend '{name}' needs a library that is not installed: {error}") from error

    return BackendType(
        name=name,
        backend=backend,
        platform=platform,
        filename=filename,
        runs_code=runs_code,
        load=lambda *arguments: module().load(*arguments),
        describe=(lambda file: module().describe(file)) if name == "onnx" else None,
    )


ONNX = _own("onnx", backend="onnxruntime", platform="onnxruntime_onnx", filename="model.onnx")
TORCHSCRIPT = _own("torchscript", backend="pytorch", platform="pytorch_libtorch", filename="model.pt")
PT2 = _own("pt2", backend="pytorch", platform="torch_aoti", filename="model.pt2", runs_code=True)
PYTHON = _own("python", backend="python", platform="", filename="model.py", runs_code=True)

OWN = (ONNX, TORCHSCRIPT, PT2, PYTHON)
"""Our backends, in the order in which a version's files are looked for if its configuration names no backend."""


def find_own(backend: str, platform: str) -> list[BackendType]:
    """Returns our backends that match both names; an empty name matches any.

    Args:
        backend: Triton's name, or that of the entry point.
    """
    return [
        own for own in OWN if backend in ("", own.backend, own.name) and platform in ("", own.platform, own.backend)
    ]


def is_backend(name: str) -> bool:
    """Returns whether there is a backend of this name, ours or another package's."""
    return any(name in (own.name, own.backend, own.platform) for own in OWN) or bool(_others().get(name))


def names() -> str:
    """Returns the names of all backends, for a message."""
    return ", ".join([*dict.fromkeys(own.backend for own in OWN), *sorted(_others())])


def get_other(name: str) -> BackendType:
    """Returns the backend of another package. Imports that package.

    Raises:
        LoadError: the package cannot be imported, is no backend, or several have a backend of this name.
    """
    found = _others()[name]
    if len(found) > 1:
        packages = ", ".join(sorted(point.dist.name if point.dist else point.value for point in found))
        raise LoadError(f"backend '{name}' is in several packages: uninstall all but one of {packages}")
    try:
        plugin = found[0].load()
    except Exception as error:  # another package's code
        raise LoadError(f"backend '{name}' ({found[0].value}) cannot be imported: {error}") from error
    if not callable(getattr(plugin, "load", None)) or not isinstance(getattr(plugin, "filename", None), str):
        raise LoadError(f"backend '{name}' ({found[0].value}) must have a function load() and a string filename")
    return BackendType(
        name=name,
        backend=name,
        filename=plugin.filename,
        runs_code=bool(getattr(plugin, "runs_code", False)),
        load=plugin.load,
        describe=getattr(plugin, "describe", None),
    )


def of_spec(spec: ModelSpec) -> BackendType:
    """Returns the backend of a completed configuration.

    Raises:
        LoadError: another package's backend cannot be imported.
    """
    own = [own for own in OWN if (own.backend, own.platform) == (spec.backend, spec.platform)]
    return own[0] if own else get_other(spec.backend)


@cache
def _others() -> dict[str, list[EntryPoint]]:
    """The entry points of other packages, by name. A name of ours is ours."""
    ours = {name for own in OWN for name in (own.name, own.backend, own.platform)}
    others: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        if point.name not in ours:
            others.setdefault(point.name, []).append(point)
    return others
