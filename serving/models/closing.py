"""Closes a version that is taken out of service."""

import contextlib
import ctypes
import logging
import threading

from serving.models.loader import Model

logger = logging.getLogger(__name__)

_CLOSE_PATIENCE_S = 60.0
"""How long a version that is taken out of service may take to finish its requests before it is left behind."""


def close_model(model: Model) -> None:
    """Finishes the requests of a version that serves no longer, and frees it. Leaves behind one that hangs."""
    name = f"{model.spec.name} version {model.version}"
    closing = threading.Thread(target=_close_batcher, args=(model, name), name=f"close-{model.spec.name}", daemon=True)
    closing.start()
    closing.join(_CLOSE_PATIENCE_S)
    if closing.is_alive():
        logger.warning("%s has not finished its requests after %g s: left behind", name, _CLOSE_PATIENCE_S)
    return_memory()


def _close_batcher(model: Model, name: str) -> None:
    try:
        model.batcher.close()
    except Exception:
        logger.exception("%s could not be closed", name)


def return_memory() -> None:
    """Returns freed memory to the system, from the middle of glibc's heaps too.

    Blocks that other models and requests hold lie between those of the closed one, so that a server whose models are
    replaced for days would grow. Takes some milliseconds. Does nothing if the C library is not glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
