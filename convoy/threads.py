"""A pool of threads for a server."""

from concurrent.futures import ThreadPoolExecutor


class ThreadPool(ThreadPoolExecutor):
    """A pool that takes every job: where the system has no thread for it, those that the pool has do it.

    Python's own raises an error, and runs the job later all the same: its caller would be answered twice.

    Args:
        num_threads: at most; one starts at once, the others when they are needed.
        name: of the threads.

    Raises:
        RuntimeError: not even one can be started.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        super().__init__(num_threads, thread_name_prefix=name)
        self.submit(int).result()

    def _adjust_thread_count(self) -> None:
        """Starts a thread if that is needed. `submit` calls it, with its job in the queue."""
        try:
            super()._adjust_thread_count()
        except RuntimeError:
            if not self._threads:
                raise
