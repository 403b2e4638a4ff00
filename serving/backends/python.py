"""Models in Python: a version's folder has `model.py` with `run(batch)`, and `load(model)` if it has something to open.

    def load(model):      # once for each instance
        global pipeline
        pipeline = joblib.load(model.folder / "pipeline.joblib")

    def run(batch):       # arrays by name, rows first; returns the outputs by name
        return {"scores": pipeline.predict_proba(batch["features"]).astype("float32")}

Each instance has a module of its own, so that its globals are its own. `from . import other` finds files beside it.
Python runs one instance at a time (the GIL), except while it waits or computes in a library.
"""

import importlib.util
import itertools
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import FileFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import numpy as np

from serving.errors import LoadError, TransientLoadError
from serving.models.spec import ModelSpec
from serving.protocol.tensors import Array, TensorSpec

logger = logging.getLogger(__name__)

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonModel:
    """What `load` of a `model.py` gets.

    Args:
        folder: the version's folder.
        parameters: of `config.pbtxt`.
        gpu: index of the CUDA device that the instance should use; None for the CPU.
        num_threads: CPU threads that one batch may use.
    """

    name: str
    version: str
    folder: Path
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    parameters: Mapping[str, str]
    gpu: int | None
    num_threads: int


class PythonInstance:
    """The functions of one module.

    Args:
        run: takes the inputs by name, returns the outputs by name.
    """

    def __init__(self, module: str, run: Callable[[dict[str, Array]], Any], spec: ModelSpec) -> None:
        self._module = module
        self._run = run
        self._inputs = [tensor.name for tensor in spec.inputs]
        self._outputs = [tensor.name for tensor in spec.outputs]

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        result = self._run(dict(zip(self._inputs, inputs, strict=True)))
        if not isinstance(result, Mapping):
            raise ValueError(f"run() of model.py must return arrays by name, and returned {type(result).__name__}")
        if missing := [name for name in self._outputs if name not in result]:
            raise ValueError(f"run() of model.py returned {sorted(result)}, but not '{missing[0]}'")
        return [np.ascontiguousarray(result[name]) for name in self._outputs]

    def close(self) -> None:
        self._run = lambda batch: None
        _forget(self._module)


class _FromSource(SourceFileLoader):
    """Compiles each time: a `.pyc` beside the source is not in the manifest, and would change the folder."""

    def get_code(self, fullname: str) -> CodeType | None:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def load(file: Path, spec: ModelSpec, gpu: int | None, num_threads: int) -> PythonInstance:
    """Opens one instance: runs the module, and then its `load`.

    Raises:
        TransientLoadError: memory or the disk are lacking now.
        LoadError: the module or its `load` raises an error, or it has no `run`.
    """
    name = f"convoy_model_{next(_numbers)}"
    model = PythonModel(
        name=spec.name,
        version=file.parent.name,
        folder=file.parent,
        inputs=spec.inputs,
        outputs=spec.outputs,
        parameters={key: value.string_value for key, value in spec.config.parameters.items()},
        gpu=gpu,
        num_threads=num_threads,
    )
    try:
        module = _import(name, file)
        if not callable(getattr(module, "run", None)):
            raise LoadError(f"{file.name} has no function run(batch)")
        if hasattr(module, "load"):
            module.load(model)
        return PythonInstance(name, module.run, spec)
    except LoadError:
        _forget(name)
        raise
    except (Exception, SystemExit) as error:  # the model's own
        _forget(name)
        logger.exception("%s version %s: %s failed", spec.name, model.version, file.name)
        kind = TransientLoadError if isinstance(error, MemoryError | OSError) else LoadError
        reason = str(error).strip().partition("\n")[0]
        raise kind(f"{file.name} cannot be loaded: {type(error).__name__}: {reason}") from error


def _import(name: str, file: Path) -> ModuleType:
    """Runs a file as a package of its own, whose modules are the files beside it."""
    folder = str(file.parent)
    sys.path_importer_cache[folder] = FileFinder(folder, (_FromSource, [".py"]))
    loader = _FromSource(name, str(file))
    spec = importlib.util.spec_from_file_location(name, file, loader=loader, submodule_search_locations=[folder])
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    loader.exec_module(module)
    return module


def _forget(name: str) -> None:
    for key in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
        sys.modules.pop(key, None)
