"""Generates the `*_pb2.py` and `*_pb2.pyi` modules from the `.proto` files: `python -m protos.generate`.

The generated modules are committed. protoc's output registers messages in protobuf's default pool; this rewrites two
lines of each module, so that they use `protos.pool.POOL`.
"""

import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

SOURCES = ("health", "model_config", "grpc_service", "models", "training", "onnx_graph")
_PACKAGE = Path(__file__).resolve().parent
_REWRITES = (
    ("from google.protobuf import descriptor_pool as _descriptor_pool\n", "from protos.pool import POOL as _POOL\n"),
    ("_descriptor_pool.Default().AddSerializedFile(", "_POOL.AddSerializedFile("),
)


def generate(folder: Path) -> None:
    """Writes the modules of every source into `folder`, which must be importable as the package `protos`.

    Raises:
        SystemExit: protoc refuses a source, or its output has changed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [f"--proto_path={_PACKAGE.parent}", f"--python_out={scratch}", f"--pyi_out={scratch}"]
        if protoc.main(["protoc", *arguments, *(str(_PACKAGE / f"{source}.proto") for source in SOURCES)]) != 0:
            raise SystemExit("error: protoc refused the sources: see its message above")
        for source in SOURCES:
            generated = Path(scratch, _PACKAGE.name, f"{source}_pb2.py")
            (folder / generated.name).write_text(_use_own_pool(generated.read_text()))
            stub = generated.with_suffix(".pyi")
            (folder / stub.name).write_text(stub.read_text())


def _use_own_pool(module: str) -> str:
    """Returns a generated module that registers its messages in `protos.pool.POOL`."""
    for old, new in _REWRITES:
        if module.count(old) != 1:
            raise SystemExit(
                f"error: this version of grpcio-tools generates other code: expected {old.strip()!r} exactly once"
            )
        module = module.replace(old, new)
    return module


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else _PACKAGE)
