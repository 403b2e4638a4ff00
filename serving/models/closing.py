"""Closes a version that is taken out of service."""

import logging
import threading

from convoy.allocator import return_freed_memory
from serving.models.loader import Model

logger = logging.getLogger(__name__)

_CLOSE_PATIENCE_S = 60.0
"""How long a version that is taken out of service may take to finish its requests before it is left behind."""


def close_model(model: Model) -> None:
    """Finishes the requests of a version that serves no longer, and frees it. Leaves behind one that hangs."""
    name = f"{model.spec.name} version {model.version}"
    closing = threading.Thread(target=_close_batcher, args=(model, name), name=f"close-{model.spec.name}", daemon=True)
    try:
        closing.start()
    except RuntimeError:  # the process has no more threads, and gets some back by this
        _close_batcher(model, name)
    else:
        closing.join(_CLOSE_PATIENCE_S)
    if closing.is_alive():
        logger.warning("%s has not finished its requests after %g s: left behind", name, _CLOSE_PATIENCE_S)
    return_freed_memory()


def _close_batcher(model: Model, name: str) -> None:
    try:
        model.batcher.close()
    except Exception:
        logger.exception("%s could not be closed", name)
