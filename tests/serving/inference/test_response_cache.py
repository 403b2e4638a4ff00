"""The response cache: what is a hit, what is never kept, and how much it holds."""

import numpy as np
import pytest

from serving.errors import Internal, ResourceExhausted, ServingError
from serving.inference import response_cache
from serving.inference.batcher import Batcher, BatcherClosed
from serving.inference.outputs import Outputs
from serving.inference.request_queue import BatchLimits
from serving.inference.response_cache import ENTRY_BYTES, ResponseCache
from serving.observability.statistics import Snapshot, Statistics
from tests.serving.inference.test_batcher import TIMEOUT_S, Doubler, Request


class Cached:
    """A batcher with a cache."""

    def __init__(self, backend: Doubler, cache: ResponseCache) -> None:
        self.statistics = Statistics()
        self.cache = cache.open(self.statistics)
        self.batcher = Batcher("m", [backend], BatchLimits(max_batch_size=8), self.statistics, self.cache)

    def ask(self, *rows: int, width: int = 2) -> "list[list[int]] | ServingError | None":
        request = Request(rows, width=width)
        self.batcher.submit(request)
        return request.wait()

    def __enter__(self) -> "Cached":
        return self

    def __exit__(self, *_: object) -> None:
        self.batcher.close()

    @property
    def counts(self) -> tuple[int, int]:
        """Hits and misses."""
        now: Snapshot = self.statistics.snapshot()
        return now.cache_hit.count, now.cache_miss.count


def test_the_same_inputs_are_computed_once() -> None:
    backend = Doubler()
    with Cached(backend, ResponseCache(1 << 20)) as made:
        assert [made.ask(3, 4) for _ in range(3)] == [[[6, 6], [8, 8]]] * 3
        assert backend.batches == [2]
        assert made.counts == (2, 1)
        now = made.statistics.snapshot()
        assert (now.success.count, now.inference_count, now.execution_count) == (3, 2, 1)
        assert sum(now.latency_counts) == 3
        assert 0 < now.cache_hit.ns < TIMEOUT_S * 1e9
        assert 0 < now.cache_miss.ns < TIMEOUT_S * 1e9


def test_other_data_and_other_shapes_of_the_same_data_are_misses() -> None:
    backend = Doubler()
    with Cached(backend, ResponseCache(1 << 20)) as made:
        assert made.ask(5, 5, width=1) == [[10], [10]]
        assert made.ask(5, width=2) == [[10, 10]]
        assert made.ask(6, width=2) == [[12, 12]]
        assert made.counts == (0, 3)
    assert response_cache.digest([b"ab", b"c"]) != response_cache.digest([b"a", b"bc"])


def test_requests_of_one_batch_are_kept_apart_and_do_not_hold_the_batch() -> None:
    backend = Doubler(held=True)
    with Cached(backend, ResponseCache(1 << 20)) as made:
        requests = [Request(rows) for rows in ((1,), (2, 3), (4,))]
        for request in requests:
            made.batcher.submit(request)
        backend.gate.release(3)
        expected = [request.wait() for request in requests]
        assert [made.ask(1), made.ask(2, 3), made.ask(4)] == expected
        assert made.counts == (3, 3)
        assert made.cache.num_bytes == 3 * ENTRY_BYTES + 8


def test_a_failed_batch_is_not_kept() -> None:
    backend = Doubler(fails="no memory")
    with Cached(backend, ResponseCache(1 << 20)) as made:
        assert isinstance(made.ask(1), Internal)
        backend.fails = ""
        assert made.ask(1) == [[2, 2]]
        assert made.counts == (0, 2)


def test_a_response_that_cannot_be_built_from_the_cache_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with Cached(Doubler(), ResponseCache(1 << 20)) as made:
        made.ask(1)

        def refuse(request: Request, outputs: Outputs, first_row: int) -> None:
            raise ResourceExhausted("too large")

        with monkeypatch.context() as patch:
            patch.setattr(Request, "finish", refuse)
            assert isinstance(made.ask(1), ResourceExhausted)
        assert made.ask(1) == [[2, 2]]
        assert made.counts == (1, 1)
        assert made.statistics.snapshot().failures["OTHER"] == 1


def test_versions_share_the_room_but_no_entry_and_take_theirs_along() -> None:
    cache = ResponseCache(1 << 20)
    with Cached(Doubler(), cache) as old:
        old.ask(1)
        with Cached(Doubler(function=lambda batch: [batch * 3]), cache) as new:
            assert new.ask(1) == [[3, 3]]
            assert new.ask(1) == [[3, 3]]
            old.batcher.close()
            assert old.cache.num_bytes == 0 < new.cache.num_bytes
            assert (new.ask(1), new.counts) == ([[3, 3]], (2, 1))
            with pytest.raises(BatcherClosed):
                old.ask(1)
            cache.add(old.cache, (((1, 2),), b"late"), Outputs([np.zeros((1, 2))], 1))
            assert old.cache.num_bytes == 0


def test_the_least_recently_used_entry_makes_room() -> None:
    with Cached(Doubler(), ResponseCache(2 * (ENTRY_BYTES + 2))) as made:
        for row in (1, 2, 1, 3):  # 3 takes the place of 2
            made.ask(row)
        assert made.counts == (1, 3)
        made.ask(1)
        assert made.counts == (2, 3)
        made.ask(2)
        assert made.counts == (2, 4)
        assert made.cache.num_bytes == 2 * (ENTRY_BYTES + 2)


def test_what_is_too_large_is_computed_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Doubler()
    with Cached(backend, ResponseCache(ENTRY_BYTES + 2)) as made:
        made.ask(1, 2)
        assert made.cache.num_bytes == 0
        made.ask(1)
        assert made.cache.num_bytes == ENTRY_BYTES + 2
        for limit in (2, 1):
            monkeypatch.setattr(response_cache, "MAX_DIGESTED_BYTES", limit)
            assert made.ask(1) == [[2, 2]]
            assert made.counts == (1, 2)
        assert backend.batches == [2, 1, 1]


def test_strings_are_kept_as_a_copy_and_counted_with_their_objects() -> None:
    array = np.array([[b"ab"], [b"cdef"]], object)
    part = Outputs([array], 2).part(1, 1)
    array[1, 0] = b"changed"
    assert part.slice(0, 0, 1).tolist() == [[b"cdef"]]
    assert part.data(0, 0, 1) == b"\x04\0\0\0cdef"
    assert part.num_bytes >= 8 + 4 + 64
