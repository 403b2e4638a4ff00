"""Metrics of several processes as one."""

from prometheus_client.core import Metric

from serving.observability.metrics import Families
from serving.workers.aggregate import lasting, merge


def family(name: str, kind: str, *samples: tuple[str, dict[str, str], float]) -> Metric:
    made = Metric(name, "help", kind)
    for sample, labels, value in samples:
        made.add_sample(sample, labels, value)
    return made


def process(requests: float, ready: float, age: float) -> list[Metric]:
    return [
        family("convoy_requests", "counter", ("convoy_requests_total", {"model": "a", "outcome": "success"}, requests)),
        family("convoy_server_ready", "gauge", ("convoy_server_ready", {}, ready)),
        family("convoy_queue_oldest_age_seconds", "gauge", ("convoy_queue_oldest_age_seconds", {"model": "a"}, age)),
        family(
            "convoy_batch_size_rows",
            "histogram",
            ("convoy_batch_size_rows_bucket", {"le": "1.0"}, requests),
            ("convoy_batch_size_rows_bucket", {"le": "+Inf"}, 2 * requests),
            ("convoy_batch_size_rows_sum", {}, 3 * requests),
        ),
    ]


def test_counters_are_added_and_gauges_by_their_meaning() -> None:
    text = Families(merge([process(3, 1, 0.5), process(4, 0, 0.25)])).render()[0].decode()
    assert 'convoy_requests_total{model="a",outcome="success"} 7.0' in text
    assert "convoy_server_ready 0.0" in text
    assert 'convoy_queue_oldest_age_seconds{model="a"} 0.5' in text
    assert 'convoy_batch_size_rows_bucket{le="+Inf"} 14.0' in text
    assert text.count("# TYPE convoy_requests_total counter") == 1


def test_what_only_one_process_has_is_kept() -> None:
    other = [family("convoy_refused", "counter", ("convoy_refused_total", {"reason": "x"}, 1))]
    merged = {found.name: found for found in merge([process(1, 1, 0), other])}
    assert merged["convoy_refused"].samples[0].value == 1


def test_a_process_that_has_ended_leaves_its_counters() -> None:
    text = Families(merge([process(1, 1, 0), lasting(process(5, 0, 9))])).render()[0].decode()
    assert 'convoy_requests_total{model="a",outcome="success"} 6.0' in text
    assert "convoy_server_ready 1.0" in text


def test_the_families_of_the_processes_do_not_change() -> None:
    one = process(1, 1, 0)
    merge([one, process(1, 1, 0)])
    assert one[0].samples[0].value == 1
