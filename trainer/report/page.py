"""The page that a run leaves behind: one HTML file that needs nothing else, and its figures as files beside it.

It shows what was found and how sure that is, how the training went, what is confused with what, the worst mistakes,
and all that is needed to do it again. Knows nothing of training; figures draws, report.html.j2 lays out.
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

from trainer.data import ImageSet
from trainer.evaluation.evaluate import Evaluation
from trainer.evaluation.intervals import confidence_level, wilson_interval
from trainer.files import write_atomically
from trainer.recipes import Schedule
from trainer.records.metrics import read_metrics
from trainer.report import figures
from trainer.report.figures import MAX_WRITTEN_CLASSES, Curves, Mistake, percent
from trainer.report.timeline import draw_cifar10_years

NUM_MISTAKES = 24
NUM_PAIRS = 20
"""Most confused pairs to show, where there are too many classes for a matrix."""
_PIXELATED_SIDE = 64
"""Images up to this size are shown with their pixels as they are."""
_LARGEST_SIDE = 192
"""Larger images are made this small for the page: twice a tile's width, for fine screens."""


def write_report(
    folder: Path, result: dict[str, Any], classes: tuple[str, ...], test_images: ImageSet, evaluation: Evaluation
) -> None:
    """Write `report.html` and `figures/` into a run folder.

    Args:
        result: what `result.json` will hold.
        test_images: what was evaluated, in the same order as in `evaluation`.
    """
    config = json.loads((folder / "config.json").read_text())
    names = tuple(_printable(name) for name in classes)
    confusion = evaluation.confusion(len(names))
    curves = _curves(folder, result, config)
    mistakes = _worst_mistakes(test_images, evaluation, names)
    with figures.style():
        panels = {name: _panel(curves, name) for name in ("loss", "accuracy") if curves.epochs}
        _write_figures(folder / "figures", curves, confusion, names, mistakes)
        years = _write_cifar10_years(folder / "figures", result) if result["dataset"] == "cifar10" else None
    page = {
        "colours": {"light": figures.LIGHT, "dark": figures.DARK},
        "result": result,
        "loss": evaluation.loss,
        "seeds": _seeds(result),
        "level": confidence_level(result["test_look"]),
        "cifar10_years": years,
        "panels": panels,
        "epochs": curves.epochs,
        "matrix": _matrix(confusion, names) if len(names) <= MAX_WRITTEN_CLASSES else None,
        "pairs": _pairs(confusion, names),
        "classes": _class_rows(confusion, names),
        "tiles": [(mistake, _data_uri(mistake.pixels)) for mistake in mistakes],
        "is_pixelated": max(test_images.images.shape[-2:]) <= _PIXELATED_SIDE,
        "settings": groups(config["fingerprint"]),
        "origin": _origin(result, config),
    }
    write_atomically(folder / "report.html", _render(page).encode(errors="replace"))


def groups(value: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """The leaves of nested settings: for each dotted path, its (name, text)."""
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
        return _printable(leaf)
    return "none" if leaf is None or leaf == [] else json.dumps(leaf)


def _render(page: dict[str, Any]) -> str:
    # Class names are names of folders: whatever they hold must come out as text.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "duration": _duration}
    template = (Path(__file__).parent / "templates" / "report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(page)


def _curves(folder: Path, result: dict[str, Any], config: dict[str, Any]) -> Curves:
    lines = read_metrics(folder)
    schedule, num_steps = Schedule(**config["fingerprint"]["recipe"]["schedule"]), result["steps"]
    return Curves(
        steps=[line for line in lines if line["kind"] == "step"],
        epochs=[line for line in lines if line["kind"] == "epoch"],
        lr_factors=[schedule.factor(step, num_steps) for step in range(num_steps)],
        images_per_epoch=result["images_per_second"] * result["train_seconds"] / result["epochs"],
    )


def _panel(curves: Curves, name: str) -> dict[str, str]:
    """One column of the learning curves for light and for dark pages, as data URIs."""
    return shades(figures.draw_curves(curves, name))


def shades(figure: Figure) -> dict[str, str]:
    """A drawing for light and for dark pages, as data URIs."""
    svg = figures.to_svg(figure, transparent=True)
    drawings = {"light": svg, "dark": figures.to_dark(svg)}
    return {shade: _uri("image/svg+xml", drawing.encode()) for shade, drawing in drawings.items()}


def _write_figures(
    folder: Path, curves: Curves, confusion: torch.Tensor, names: tuple[str, ...], mistakes: list[Mistake]
) -> None:
    folder.mkdir(exist_ok=True)
    drawings = {
        "confusion": figures.draw_confusion(confusion.numpy(), names),
        "mistakes": figures.draw_mistakes(mistakes),
    }
    if curves.epochs:  # none where the disk was full
        drawings["curves"] = figures.draw_curves(curves, "loss", "accuracy")
    for name, drawing in drawings.items():
        write_figure(folder / name, drawing)


def write_figure(stem: Path, drawing: Figure) -> None:
    """The drawing as `stem.svg` and `stem.png`."""
    write_atomically(stem.with_name(f"{stem.name}.svg"), figures.to_svg(drawing).encode())
    write_atomically(stem.with_name(f"{stem.name}.png"), figures.to_png(drawing))


def _write_cifar10_years(folder: Path, result: dict[str, Any]) -> dict[str, str]:
    today = datetime.datetime.now(datetime.UTC)
    year = today.year + (today.timetuple().tm_yday - 1) / 365
    drawing = draw_cifar10_years(result["test_accuracy"], year, result["recipe"])
    write_figure(folder / "cifar10-years", drawing)
    return shades(drawing)


def _seeds(result: dict[str, Any]) -> dict[str, Any] | None:
    """The test accuracies of all runs of this setting in the ledger, where there are several."""
    by_seed = result["test_accuracy_of_seeds"]
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


def _worst_mistakes(images: ImageSet, evaluation: Evaluation, names: tuple[str, ...]) -> list[Mistake]:
    """The mistakes made with the most confidence, worst first."""
    wrong = torch.nonzero(evaluation.predicted != evaluation.labels)[:, 0]
    order = torch.argsort(evaluation.confidence[wrong], descending=True, stable=True)
    return [
        Mistake(
            index=index,
            pixels=_small_picture(images.images[index]),
            label=names[int(evaluation.labels[index])],
            predicted=names[int(evaluation.predicted[index])],
            confidence=float(evaluation.confidence[index]),
            label_probability=float(evaluation.label_probability[index]),
        )
        for index in wrong[order[:NUM_MISTAKES]].tolist()
    ]


def _small_picture(pixels: torch.Tensor) -> npt.NDArray[np.uint8]:
    """uint8 `[C, H, W]` as `[H, W]` or `[H, W, 3]`, no larger than a page needs."""
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()
    if max(array.shape[:2]) <= _LARGEST_SIDE:
        return np.ascontiguousarray(array)
    picture = Image.fromarray(np.ascontiguousarray(array))
    picture.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def _data_uri(pixels: npt.NDArray[np.uint8]) -> str:
    """PNG where each pixel is seen, and JPEG, a fifth of the size, for what looks like a photograph."""
    kind = "png" if max(pixels.shape[:2]) <= _PIXELATED_SIDE else "jpeg"
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind, quality=88)
    return _uri(f"image/{kind}", file.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _matrix(confusion: torch.Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    """Rows of (count, heat, class), where heat, 0 to 1, is a mistake's share of the most frequent mistake."""
    most = max(1, int(confusion.clone().fill_diagonal_(0).max()))
    rows = [
        [(count, 0.0 if row == column else count / most) for column, count in enumerate(counts)]
        for row, counts in enumerate(confusion.tolist())
    ]
    return {"names": names, "rows": list(zip(names, rows, strict=True))}


def _pairs(confusion: torch.Tensor, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The most frequent confusions, most frequent first."""
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
    """Each class with its accuracy, worst first; those without test images last."""
    mistakes = confusion.clone().fill_diagonal_(0)
    most, taken_for = mistakes.max(dim=1)
    columns = zip(
        names, confusion.sum(dim=1).tolist(), confusion.diag().tolist(), most.tolist(), taken_for.tolist(), strict=True
    )
    rows = [
        {
            "name": name,
            "num_images": num_images,
            "num_wrong": num_images - num_right,
            "accuracy": num_right / num_images if num_images else None,
            "interval": wilson_interval(num_right, num_images),
            "taken_for": names[other] if count else None,
            "taken_for_count": count,
        }
        for name, num_images, num_right, count, other in columns
    ]
    rows.sort(key=lambda row: 2 if row["accuracy"] is None else row["accuracy"])
    largest = 1 - (rows[0]["accuracy"] or 0) or 1
    return [{**row, "error_against_worst": (1 - (row["accuracy"] or 0)) / largest} for row in rows]


def _origin(result: dict[str, Any], config: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Where the numbers come from: code, machine, data, weights."""
    started = config["started_with"]
    rows = {"git_commit": started["git_commit"], "world_size": result["world_size"]}
    rows |= {name: result[name] for name in ("device", "precision", "dataset_sha256", "weights_sha256", "exported")}
    rows["machine"] = result["machine"]
    if started["machine"] != result["machine"] or started["world_size"] != result["world_size"]:
        rows["begun_on"] = {"world_size": started["world_size"], **started["machine"]}
    return groups(rows)


def _duration(seconds: float) -> str:
    """`35.0 s`, `3 min 12 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def _printable(text: str) -> str:
    """Names of folders may hold anything, undecodable bytes and control characters included."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
