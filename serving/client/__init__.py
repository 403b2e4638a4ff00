"""Ask a server of the Open Inference Protocol: `Client` from Python, `python -m serving.client` from the shell.

Knows the protocol and nothing of our server: whatever speaks it with Triton's ModelConfig and classification extension
will do.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.client.client import Client
    from serving.client.connection import Tls
    from serving.client.errors import ClientError
    from serving.client.results import Answer, Classification, ModelState, Prediction

__all__ = ["Answer", "Classification", "Client", "ClientError", "ModelState", "Prediction", "Tls"]

_HOMES = {"Client": "client", "Tls": "connection", "ClientError": "errors"}


def __getattr__(name: str) -> Any:
    """Imported when first asked for: Python imports this before the command line can say how to end quietly."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'results')}"), name)
