"""A client for the Open Inference Protocol: `Client` in Python, `python -m serving.client` in the shell.

It works with every server that supports the protocol with Triton's ModelConfig and classification extensions.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.client.client import Client
    from serving.client.connection import Tls
    from serving.client.errors import ClientError
    from serving.client.images import ImageFile
    from serving.client.results import Classification, InferResult, ModelState, Prediction

__all__ = ["Classification", "Client", "ClientError", "ImageFile", "InferResult", "ModelState", "Prediction", "Tls"]

_MODULES = {"Client": "client", "Tls": "connection", "ClientError": "errors", "ImageFile": "images"}


def __getattr__(name: str) -> Any:
    """Imports on first use: Python imports this package before the command line can install its signal handlers."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'results')}"), name)
