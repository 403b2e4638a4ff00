"""Makes the `*_pb2.py` and `*_pb2.pyi` modules from the `.proto` files: `python -m protos.generate`.

What comes out is committed; the server never runs this. protoc's own output registers the messages in protobuf's
default pool, so two lines of each module are rewritten to use `protos.pool.POOL`.
"""

import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

SOURCES = ("health", "model_config", "grpc_service")
_PACKAGE = Path(__file__).resolve().parent
_REWRITES = (
    ("from google.protobuf import descriptor_pool as _descriptor_pool\n", "from protos.pool import POOL as _POOL\n"),
    ("_descriptor_pool.Default().AddSerializedFile(", "_POOL.AddSerializedFile("),
)


def generate(folder: Path) -> None:
    """Write the modules of every source into `folder`, where they must be imported as the package `protos`."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [f"--proto_path={_PACKAGE.parent}", f"--python_out={scratch}", f"--pyi_out={scratch}"]
        if protoc.main(["protoc", *arguments, *(str(_PACKAGE / f"{source}.proto") for source in SOURCES)]) != 0:
            raise SystemExit("error: protoc refused the sources; see its message above")
        for source in SOURCES:
            made = Path(scratch, _PACKAGE.name, f"{source}_pb2.py")
            (folder / made.name).write_text(_private(made.read_text()))
            stub = made.with_suffix(".pyi")
            (folder / stub.name).write_text(stub.read_text())


def _private(module: str) -> str:
    """The generated module with its messages in our own pool."""
    for old, new in _REWRITES:
        if module.count(old) != 1:
            raise SystemExit(
                f"error: this grpcio-tools writes modules in another way: no single {old.strip()!r} in them"
            )
        module = module.replace(old, new)
    return module


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else _PACKAGE)
