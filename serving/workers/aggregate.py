"""One set of metrics from those of all workers."""

from collections.abc import Iterable, Sequence

from prometheus_client.core import Metric
from prometheus_client.samples import Sample

_LARGEST = ("_oldest_age_seconds", "_load_seconds", "_load_duration_secs")
"""Endings of gauges of which the largest of all workers is shown."""
_SMALLEST = ("convoy_server_ready", "convoy_model_ready", "process_start_time_seconds", "process_max_fds")
"""Gauges of which the smallest is shown. All others are added up, as counters and histograms are."""

Key = tuple[str, tuple[tuple[str, str], ...]]


def merge(parts: Iterable[Sequence[Metric]]) -> list[Metric]:
    """Returns the families of several processes as one, with the samples of equal names and labels combined."""
    families: dict[str, Metric] = {}
    samples: dict[str, dict[Key, Sample]] = {}
    for part in parts:
        for family in part:
            families.setdefault(family.name, family)
            known = samples.setdefault(family.name, {})
            for sample in family.samples:
                key = (sample.name, tuple(sorted(sample.labels.items())))
                known[key] = sample if key not in known else _combine(known[key], sample)
    merged = []
    for name, family in families.items():
        copy = Metric(family.name, family.documentation, family.type)
        copy.samples = list(samples[name].values())
        merged.append(copy)
    return merged


def lasting(families: Iterable[Metric]) -> list[Metric]:
    """Returns what a process that has ended leaves behind: its counters and histograms, which must never fall."""
    return [family for family in families if family.type in ("counter", "histogram")]


def _combine(one: Sample, other: Sample) -> Sample:
    if one.name in _SMALLEST:
        value = min(one.value, other.value)
    elif one.name.endswith(_LARGEST):
        value = max(one.value, other.value)
    else:
        value = one.value + other.value
    return one._replace(value=value)
