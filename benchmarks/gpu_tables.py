"""The results of `benchmarks/gpu.py` in Markdown."""

import statistics
from typing import Any


def table(measured: dict[str, Any], failures: dict[str, str]) -> list[str]:
    """Returns the results in Markdown.

    Args:
        measured: the results of the parts that began.
        failures: why each of these has no result, or a part of it.
    """
    show = {"steps": _show_steps, "clock": _show_clock, "cold": _show_cold, "seeds": _show_seeds, "ranks": _show_ranks}
    lines = [line for part, found in measured.items() if found for line in show[part](found)]
    if failures:
        lines += ["## Failed", "", *(f"- {name}: {reason.splitlines()[-1]}" for name, reason in failures.items()), ""]
    return lines


def _show_steps(found: dict[str, Any]) -> list[str]:
    lines = ["## Steps", "", "| step of | images | pixels | our kernels | torch's kernels | compiled | kernels |"]
    lines.append("|---|---|---|---|---|---|---|")
    for recipe, ways in found.items():
        first = next(iter(ways.values()))
        for pixels in first["microseconds"]:
            cells = []
            for name in ("our kernels", "torch's kernels", "compiled"):
                cells.append(f"{ways[name]['microseconds'][pixels]:,.0f} µs" if name in ways else "–")
            number = ways.get("our kernels", {}).get("kernels", {}).get("number")
            shown = "–" if number is None else f"{number:.0f}"
            lines.append(f"| `{recipe}` | {first['images']} | {pixels} | {' | '.join(cells)} | {shown} |")
    lines += ["", "Ready (built, warmed up and captured) after, in seconds:"]
    for recipe, ways in found.items():
        shown = ", ".join(f"{name} {way['ready_seconds']:.1f}" for name, way in ways.items())
        lines.append(f"- `{recipe}`: {shown}")
    for recipe, ways in found.items():
        most = ways.get("our kernels", {}).get("kernels", {}).get("most", {})
        if most:
            lines.append(f"- `{recipe}`, kernels: " + "; ".join(f"{name} {us:.0f} µs" for name, us in most.items()))
    return [*lines, ""]


def _show_clock(found: dict[str, Any]) -> list[str]:
    lines = [
        "## Whole trainings, warm",
        "",
        "All 50,000 images; from the initial weights and the whitening to the last step. Building and compiling is not "
        "in it, nor is the evaluation with several views, whose accuracy is shown.",
        "",
        "| training | runs | seconds | of these preparing | test accuracy | ready after |",
        "|---|---|---|---|---|---|",
    ]
    for name, child in found.items():
        runs = child["runs"]
        if not runs:
            continue
        preparing = [run["preparing_seconds"] for run in runs if "preparing_seconds" in run]
        accuracies = [100 * run["test_accuracy"] for run in runs]
        error = f" ± {statistics.stdev(accuracies) / len(accuracies) ** 0.5:.2f}" if len(accuracies) > 1 else ""
        cells = (
            name,
            str(len(runs)),
            _spread([run["train_seconds"] for run in runs]),
            _spread(preparing) if preparing else "–",
            f"{statistics.mean(accuracies):.2f}{error} %",
            f"{child['ready_seconds']:.1f} s",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _show_cold(found: dict[str, Any]) -> list[str]:
    lines = ["## Whole commands, with an empty cache of kernels; medians of the seconds until lines are printed", ""]
    lines += ["| command | runs | seconds | its training | until | test accuracy |", "|---|---|---|---|---|---|"]
    for recipe, runs in found.items():
        seconds, training = ([run[name] for run in runs] for name in ("seconds", "train_seconds"))
        accuracy = 100 * statistics.mean(run["test_accuracy"] for run in runs)
        until = {
            name: statistics.median(run["seconds_until"][name] for run in runs) for name in runs[0]["seconds_until"]
        }
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in until.items())
        shown = f"{len(runs)} | {_spread(seconds)} | {_spread(training)} | {phases} | {accuracy:.2f} %"
        lines.append(f"| `convoy train {recipe} --num-validation 0 --no-export` | {shown} |")
    return [*lines, ""]


def _show_seeds(found: dict[str, Any]) -> list[str]:
    lines = ["## Seeds side by side", "", "| recipe | seeds | µs a step of all | µs a seed | images/s |"]
    lines.append("|---|---|---|---|---|")
    for recipe, numbers in found["side by side"].items():
        for number, rate in numbers.items():
            us = rate["microseconds_a_step_of_all"]
            shown = f"{us:,.0f} | {us / int(number):,.0f} | {rate['images_per_second']:,.0f}"
            lines.append(f"| `{recipe}` | {number} | {shown} |")
    study = found.get("study of 100 seeds of mnist")
    if study:
        lines += [
            "",
            f"`convoy study seeds` (100 seeds, 10 epochs): {study['seconds']:.1f} s with everything, "
            f"{study['training_seconds']:.1f} s of training, mean test error {study['mean_error_percent']:.2f} %.",
        ]
    return [*lines, ""]


def _show_ranks(found: dict[str, Any]) -> list[str]:
    shared = ", which share one GPU: their times mean nothing" if found["one_gpu_is_shared"] else ""
    lines = [
        f"## {found['ranks']} ranks{shared}",
        "",
        "| step of | vector | DDP | DDP, bfloat16 |",
        "|---|---|---|---|",
    ]
    for recipe, ways in found["microseconds_a_step"].items():
        lines.append(f"| `{recipe}` | {' | '.join(f'{us:,.0f} µs' for us in ways.values())} |")
    return [*lines, ""]


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
