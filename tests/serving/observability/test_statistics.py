"""Statistics of batches and failures are summed, and a snapshot no longer changes."""

import copy

from serving.observability.statistics import BatchDurations, Duration, Snapshot, Statistics

MS = 1_000_000


def record(statistics: Statistics) -> None:
    """A batch of two requests with 3 rows in all, which arrived 1 and 2 ms before it was closed, and one failure."""
    times_ns = (10 * MS, 11 * MS, 14 * MS, 16 * MS)
    statistics.record_batch([8 * MS, 9 * MS], 3, times_ns, "full")
    statistics.record_failure("CANCELED", "CANCELLED", 5 * MS)


def test_a_batch_counts_for_each_of_its_requests() -> None:
    statistics = Statistics()
    record(statistics)
    snapshot = statistics.snapshot()
    assert snapshot.success == Duration(2, 15 * MS)
    assert snapshot.queue == Duration(2, 3 * MS)
    assert snapshot.compute_input == Duration(2, 2 * MS)
    assert snapshot.compute_infer == Duration(2, 6 * MS)
    assert snapshot.compute_output == Duration(2, 4 * MS)
    assert (snapshot.inference_count, snapshot.execution_count) == (3, 1)
    assert snapshot.batch_sizes == {3: BatchDurations(1, 1 * MS, 3 * MS, 2 * MS)}
    assert snapshot.batch_triggers == {"full": 1, "idle": 0, "delay": 0}
    assert snapshot.latency_counts[4] == 2, "7 and 8 ms are between 5 and 10 ms"
    assert snapshot.fail == Duration(1, 5 * MS)
    assert snapshot.failures["CANCELED"] == 1


def test_a_snapshot_shares_nothing_with_the_running_totals() -> None:
    statistics = Statistics()
    record(statistics)
    snapshot = statistics.snapshot()
    before = copy.deepcopy(snapshot)
    record(statistics)
    assert snapshot == before
    assert statistics.snapshot() != before


def test_every_field_of_a_snapshot_is_copied() -> None:
    original = Snapshot(batch_sizes={1: BatchDurations()})
    copied = original.copy()
    assert copied == original
    for name in Snapshot.__slots__:
        value = getattr(original, name)
        assert isinstance(value, int) or getattr(copied, name) is not value, name
    assert copied.batch_sizes[1] is not original.batch_sizes[1]
