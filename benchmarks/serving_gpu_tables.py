"""The tables of `serving_gpu.py`."""

import statistics
from collections.abc import Sequence
from typing import Any


def table(measured: dict[str, Any], left_out: dict[str, str], num_together: int, load: str) -> list[str]:
    """Returns all tables in Markdown.

    Args:
        left_out: what was not measured, and why.
        num_together: instances of each model.
        load: says what the server's clients do.
    """
    return [
        *_show_alone(measured["alone"]),
        *_show_together(measured["two"], num_together),
        *_show_server(measured["server"], num_together, load),
        *(f"- Left out: {name}: {reason}" for name, reason in left_out.items()),
    ]


def _show_alone(found: dict[str, Any]) -> list[str]:
    lines = [
        "Microseconds of one run, and how many times as long the naive way takes (above 1: ours is faster):",
        "",
        "| network, backend, images | ours | naive | naive / ours | first run, ours |",
        "|---|---|---|---|---|",
    ]
    for name, seen in found.items():
        times = f"{_spread(seen['ours'], 0)} | {_spread(seen['naive'], 0)}"
        ratios = _spread(_quotients(seen["naive"], seen["ours"]))
        lines.append(f"| {name} | {times} | {ratios} | {seen['first_us']['ours'] / 1000:,.1f} ms |")
    return [*lines, ""]


def _show_together(found: dict[str, Any], number: int) -> list[str]:
    lines = [
        f"Images a second of {number} instances on {number} threads, and how many times as many as of one:",
        "",
        "| network, backend, images | ours | times one | naive | times one | ours / naive |",
        "|---|---|---|---|---|---|",
    ]
    for name, seen in found.items():
        cells = []
        for way in ("ours", "naive"):
            together = seen[f"{way} {number}"]
            cells += [_spread(together, 0), _spread(_quotients(together, seen[f"{way} 1"]))]
        ratios = _spread(_quotients(seen[f"ours {number}"], seen[f"naive {number}"]))
        lines.append(f"| {name} | {' | '.join(cells)} | {ratios} |")
    return [*lines, ""]


def _show_server(found: dict[str, Any], number: int, load: str) -> list[str]:
    lines = [
        f"A server with {number} instances of each model; on the same machine {load}:",
        "",
        "| network, backend, images a request | images/s | median | p99 | mean batch |",
        "|---|---|---|---|---|",
    ]
    for name, seen in found.items():
        latencies = f"{seen['median_ms']:.2f} ms | {seen['p99_ms']:.2f} ms"
        lines.append(f"| {name} | {seen['images_a_second']:,.0f} | {latencies} | {seen['mean_batch']:.0f} |")
    return [*lines, ""]


def _spread(values: Sequence[float], digits: int = 2) -> str:
    numbers = (statistics.median(values), min(values), max(values))
    middle, least, most = (f"{number:,.{digits}f}" for number in numbers)
    return f"{middle} [{least}, {most}]"


def _quotients(some: Sequence[float], others: Sequence[float]) -> list[float]:
    """Returns the ratio of each round."""
    return [one / other for one, other in zip(some, others, strict=True)]
