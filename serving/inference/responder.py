"""Answers the requests of computed batches on a thread of its own.

A GPU would wait while its instance's thread encodes responses. On CPUs, a second thread would only cost time: there,
the instance's thread answers by itself.
"""

import logging
import queue
import threading
from collections.abc import Callable

from serving.inference.batch import ComputedBatch

logger = logging.getLogger(__name__)


class Responder:
    """One thread that answers batches in the order in which they are handed over.

    Args:
        answer: answers one batch.
        max_waiting: batches that may wait; then `hand_over` blocks.
    """

    def __init__(self, name: str, answer: Callable[[ComputedBatch], None], max_waiting: int) -> None:
        self._answer = answer
        self._batches: queue.Queue[ComputedBatch | None] = queue.Queue(max_waiting)
        self._thread = threading.Thread(target=self._work, name=f"{name}-responder", daemon=True)
        self._thread.start()

    def hand_over(self, batch: ComputedBatch) -> None:
        """Gives a batch to the responder's thread."""
        self._batches.put(batch)

    def close(self) -> None:
        """Answers all batches, then ends the thread."""
        self._batches.put(None)
        self._thread.join()

    def _work(self) -> None:
        while True:
            batch = self._batches.get()
            if batch is None:
                return
            try:
                self._answer(batch)
            except Exception:
                logger.exception("a batch could not be answered")
            del batch  # else its messages stay in memory until the next batch
