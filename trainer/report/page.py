"""Writes a run's report: one self-contained HTML file, and its figures as files beside it.

It shows the test accuracy with its interval, warnings about the training, the learning curves, the confusion matrix,
the most confident mistakes, and what is needed to reproduce the run. `figures` draws, `report.html.j2` lays out.
This module does not know how a run is trained.
"""

import base64
import datetime
import io
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from convoy.printable import printable
from trainer.data import Images
from trainer.evaluation.evaluate import Evaluation
from trainer.evaluation.intervals import confidence_level, wilson_interval
from trainer.evaluation.views import NUM_VIEWS, is_headline_averaged
from trainer.files import write_atomically
from trainer.records.metrics import read_metrics
from trainer.records.origin import Origin
from trainer.records.result import Result
from trainer.records.run_folder import RunFolder
from trainer.report import figures
from trainer.report.figures import MAX_WRITTEN_CLASSES, Curves, ReportedMistake, percent, shorten
from trainer.report.timeline import draw_cifar10_years

NUM_MISTAKES = 24
NUM_PAIRS = 20
"""Number of most confused pairs that are listed, where there are too many classes for a matrix."""
MIN_POINT_IMAGES = 100
"""With fewer test images the headline is the interval: 6 of 6 images right are not 100 %."""
MAX_CLASS_RATIO = 1.5
"""The balanced accuracy is shown if the largest class has more than this many times the test images of the smallest."""
MAX_BALANCE_DIFFERENCE = 0.01
"""And if it differs from the accuracy by more than this."""
_PIXELATED_SIDE = 64
"""Images up to this size are shown with their pixels as they are."""
_LARGEST_SIDE = 192
"""Larger images are scaled down to this: twice a tile's width, for high-resolution screens."""


def write_report(
    folder: Path, result: Result, classes: tuple[str, ...], test_images: Images, evaluation: Evaluation
) -> None:
    """Writes `report.html` and `figures/` into a run folder.

    Args:
        result: the content of `result.json`.
        test_images: the evaluated images, in the same order as in `evaluation`.
    """
    run = RunFolder.read(folder)
    names = tuple(printable(name) for name in classes)
    confusion = evaluation.confusion(len(names))
    curves = _curves(run, result)
    mistakes = _worst_mistakes(test_images, evaluation, names)
    with figures.style():
        columns = ("loss", "accuracy") if curves.epochs else ()
        panels = {name: both_color_schemes(figures.draw_curves(curves, name)) for name in columns}
        _write_figures(folder / "figures", curves, confusion, names, mistakes)
        years = _write_cifar10_years(folder / "figures", result) if result.dataset == "cifar10" else None
    views = run.fingerprint.test_time_views
    page = {
        "colours": {"light": figures.LIGHT, "dark": figures.DARK},
        "result": result,
        "headline": _headline(result),
        "is_interval": result.num_test < MIN_POINT_IMAGES,
        "keeps_best": run.fingerprint.recipe.keep_best and result.best_epoch is not None,
        "balanced_accuracy": _balanced_accuracy(result, confusion),
        "test_time_views": views,
        "num_views": NUM_VIEWS[views],
        "with_views": result.test_errors_with_views,
        "is_averaged": is_headline_averaged(views, result.test_errors_with_views),
        "loss": evaluation.loss,
        "seeds": _seeds(result),
        "level": confidence_level(result.test_look),
        "cifar10_years": years,
        "panels": panels,
        "epochs": curves.epochs,
        "matrix": _matrix(confusion, names) if len(names) <= MAX_WRITTEN_CLASSES else None,
        "pairs": _pairs(confusion, names),
        "classes": _class_rows(confusion, names),
        "tiles": [(mistake, _data_uri(mistake.pixels)) for mistake in mistakes],
        "is_pixelated": max(test_images.shape[1:]) <= _PIXELATED_SIDE,
        "settings": groups(run.fingerprint.settings),
        "origin": _origin(result, run.origin),
    }
    write_atomically(folder / "report.html", _render(page).encode(errors="replace"))


def _headline(result: Result) -> str:
    """Returns the test accuracy, or its interval where there are too few images for a point estimate."""
    if result.num_test < MIN_POINT_IMAGES:
        return _range(result.test_interval, 0)
    return percent(result.test_accuracy)


def _balanced_accuracy(result: Result, confusion: torch.Tensor) -> float | None:
    """Returns the balanced accuracy if it is not the accuracy, or the classes are unbalanced and some are wrong."""
    sizes = confusion.sum(dim=1)
    sizes, balanced = sizes[sizes > 0], result.balanced_accuracy
    if balanced is None or not len(sizes) or not result.test_errors:
        return None
    is_unbalanced = int(sizes.max()) > MAX_CLASS_RATIO * int(sizes.min())
    return balanced if is_unbalanced or abs(balanced - result.test_accuracy) > MAX_BALANCE_DIFFERENCE else None


def groups(value: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Returns the leaves of nested settings as rows of (name, text), for each dotted path."""
    found: dict[str, list[tuple[str, str]]] = {"": []}

    def visit(inner: dict[str, Any], path: str) -> None:
        for name, item in inner.items():
            if isinstance(item, dict):
                visit(item, f"{path}.{name}".lstrip("."))
            else:
                found.setdefault(path, []).append((name, _text(item)))

    visit(value, "")
    return {path: rows for path, rows in found.items() if rows}


def _text(leaf: Any) -> str:
    if isinstance(leaf, str):
        return printable(leaf)
    return "none" if leaf is None or leaf == [] else json.dumps(leaf)


def _render(page: dict[str, Any]) -> str:
    # Class names are names of folders, and may contain HTML.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "range": _range, "duration": _duration}
    template = (Path(__file__).parent / "templates" / "report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(page)


def _curves(run: RunFolder, result: Result) -> Curves:
    lines = read_metrics(run.path)
    recipe = run.fingerprint.recipe
    num_planned = result.steps // result.epochs * recipe.epochs  # the training may have ended early
    return Curves(
        steps=[line for line in lines if line["kind"] == "step"],
        epochs=[line for line in lines if line["kind"] == "epoch"],
        lr_factors=[recipe.schedule.factor(step, num_planned) for step in range(result.steps)],
        images_per_epoch=result.images_per_second * result.train_seconds / result.epochs,
    )


def both_color_schemes(figure: Figure) -> dict[str, str]:
    """Returns a drawing for light and for dark pages, as data URIs."""
    svg = figures.to_svg(figure, transparent=True)
    drawings = {"light": svg, "dark": figures.to_dark(svg)}
    return {shade: _uri("image/svg+xml", drawing.encode()) for shade, drawing in drawings.items()}


def _write_figures(
    folder: Path, curves: Curves, confusion: torch.Tensor, names: tuple[str, ...], mistakes: list[ReportedMistake]
) -> None:
    folder.mkdir(exist_ok=True)
    drawings = {
        "confusion": figures.draw_confusion(confusion.numpy(), names),
        "mistakes": figures.draw_mistakes(mistakes),
    }
    if curves.epochs:  # there are none if the disk was full
        drawings["curves"] = figures.draw_curves(curves, "loss", "accuracy")
    for name, drawing in drawings.items():
        write_figure(folder / name, drawing)


def write_figure(stem: Path, drawing: Figure) -> None:
    """Writes the drawing as `stem.svg` and `stem.png`."""
    write_atomically(stem.with_name(f"{stem.name}.svg"), figures.to_svg(drawing).encode())
    write_atomically(stem.with_name(f"{stem.name}.png"), figures.to_png(drawing))


def _write_cifar10_years(folder: Path, result: Result) -> dict[str, str]:
    today = datetime.datetime.now(datetime.UTC)
    year = today.year + (today.timetuple().tm_yday - 1) / 365
    drawing = draw_cifar10_years(result.test_accuracy, year, result.recipe)
    write_figure(folder / "cifar10-years", drawing)
    return both_color_schemes(drawing)


def _seeds(result: Result) -> dict[str, Any] | None:
    """Returns a summary of the test accuracies of this setting in the ledger, or None if there is only one."""
    by_seed = result.test_accuracy_of_seeds or {}
    accuracies = [accuracy for found in by_seed.values() for accuracy in found]
    if len(accuracies) < 2:
        return None
    return {
        "num_runs": len(accuracies),
        "num_seeds": len(by_seed),
        "worst": min(accuracies),
        "median": statistics.median(accuracies),
        "best": max(accuracies),
    }


def _worst_mistakes(images: Images, evaluation: Evaluation, names: tuple[str, ...]) -> list[ReportedMistake]:
    """Returns the mistakes with the highest confidence, highest first."""
    worst = evaluation.worst_mistakes(NUM_MISTAKES)
    return [
        ReportedMistake(
            index=index,
            pixels=_thumbnail(pixels),
            label=names[int(evaluation.labels[index])],
            predicted=names[int(evaluation.predicted[index])],
            confidence=float(evaluation.confidence[index]),
            label_probability=float(evaluation.label_probability[index]),
        )
        for index, pixels in zip(worst.tolist(), images.take(worst), strict=True)
    ]


def _thumbnail(pixels: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Returns uint8 `[C, H, W]` as `[H, W]` or `[H, W, 3]`, scaled down if it is larger than a tile needs."""
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()
    if max(array.shape[:2]) <= _LARGEST_SIDE:
        return np.ascontiguousarray(array)
    picture = Image.fromarray(np.ascontiguousarray(array))
    picture.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def _data_uri(pixels: npt.NDArray[np.uint8]) -> str:
    """Returns small images as PNG and larger ones, which are photographs, as JPEG at a fifth of the size."""
    kind = "png" if max(pixels.shape[:2]) <= _PIXELATED_SIDE else "jpeg"
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind, quality=88)
    return _uri(f"image/{kind}", file.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _matrix(confusion: torch.Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    """Returns rows of (count, heat); heat is the count of a mistake divided by that of the most frequent mistake.

    Long names are cut in the middle: cut at their ends, those that begin alike would be the same.
    """
    names = tuple(shorten(name, 20) for name in names)
    most = max(1, int(confusion.clone().fill_diagonal_(0).max()))
    rows = [
        [(count, 0.0 if row == column else count / most) for column, count in enumerate(counts)]
        for row, counts in enumerate(confusion.tolist())
    ]
    return {"names": names, "rows": list(zip(names, rows, strict=True))}


def _pairs(confusion: torch.Tensor, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Returns the most frequent confusions, most frequent first."""
    mistakes = confusion.clone().fill_diagonal_(0)
    found = torch.nonzero(mistakes)
    order = torch.argsort(mistakes[found[:, 0], found[:, 1]], descending=True, stable=True)[:NUM_PAIRS]
    per_label = confusion.sum(dim=1)
    return [
        {
            "label": names[label],
            "predicted": names[predicted],
            "count": int(mistakes[label, predicted]),
            "share": int(mistakes[label, predicted]) / int(per_label[label]),
        }
        for label, predicted in found[order].tolist()
    ]


def _class_rows(confusion: torch.Tensor, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Returns each class with its recall, worst first, classes without test images last."""
    mistakes = confusion.clone().fill_diagonal_(0)
    most, predicted = mistakes.max(dim=1)
    columns = zip(
        names, confusion.sum(dim=1).tolist(), confusion.diag().tolist(), most.tolist(), predicted.tolist(), strict=True
    )
    rows = [
        {
            "name": name,
            "num_images": num_images,
            "num_wrong": num_images - num_right,
            "recall": num_right / num_images if num_images else None,
            "interval": wilson_interval(num_right, num_images),
            "predicted": names[other] if count else None,
            "predicted_count": count,
        }
        for name, num_images, num_right, count, other in columns
    ]
    rows.sort(key=lambda row: 2 if row["recall"] is None else row["recall"])
    largest = 1 - (rows[0]["recall"] or 0) or 1
    return [{**row, "share_of_worst": (1 - (row["recall"] or 0)) / largest} for row in rows]


def _origin(result: Result, started_with: Origin) -> dict[str, list[tuple[str, str]]]:
    """Returns the code, machine, data and weights behind the numbers."""
    rows: dict[str, Any] = {"git_commit": started_with.git_commit, "world_size": result.world_size}
    shown = ("device", "precision", "dataset_sha256", "weights_sha256", "exported", "machine")
    rows |= {name: getattr(result, name) for name in shown}
    if started_with.machine != result.machine or started_with.world_size != result.world_size:
        rows["begun_on"] = {"world_size": started_with.world_size, **started_with.machine}
    return groups(rows)


def _range(interval: tuple[float, float], num_decimals: int) -> str:
    """Returns an interval as `90.03 – 93.12 %`."""
    low, high = (percent(end, num_decimals) for end in interval)
    return f"{low.removesuffix(' %')} – {high}"


def _duration(seconds: float) -> str:
    """Returns seconds as `35.0 s`, `3 min 12 s` or `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"
