"""A run's report, read back with an HTML parser, and its figures, read back in their formats."""

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from PIL import Image

from trainer.data import ImageSet
from trainer.evaluation.evaluate import Evaluation
from trainer.evaluation.intervals import simultaneous_interval, wilson_interval
from trainer.evaluation.recall import balanced_accuracy
from trainer.recipes import RECIPES
from trainer.records.fingerprint import Fingerprint
from trainer.records.result import Result
from trainer.report.figures import Curves, ReportedMistake, draw_curves, draw_mistakes, percent, style
from trainer.report.page import MIN_POINT_IMAGES, NUM_MISTAKES, NUM_PAIRS, groups, write_report

MACHINE = {"device": "a <fast> one", "cpus": 2, "python": "3.11.7", "torch": "2.15.0"}
FIGURES = ("curves", "confusion", "mistakes")


class Page(HTMLParser):
    """A page's text, and every attribute of every element."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._pieces: list[str] = []
        self._in_style = False
        self.feed(html)
        self.text = " ".join(" ".join(self._pieces).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if not self._in_style:
            self._pieces.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def evaluation(labels: list[int], predicted: list[int]) -> Evaluation:
    """An evaluation with a confidence that rises with the index of the image."""
    confidence = torch.linspace(0.5, 0.99, len(labels))
    wrong = torch.tensor(labels) != torch.tensor(predicted)
    return Evaluation(
        labels=torch.tensor(labels),
        predicted=torch.tensor(predicted),
        confidence=confidence,
        label_probability=torch.where(wrong, (1 - confidence) / 2, confidence),
        loss=0.4321,
    )


def result_of(seen: Evaluation, epochs: int) -> Result:
    return Result(
        recipe="mnist",
        dataset="folder:pets",
        dataset_sha256="d" * 64,
        model="lecture",
        num_parameters=105_506,
        world_size=4,
        device="cpu",
        precision="float32",
        seed=7,
        epochs=epochs,
        steps=100 * epochs,
        global_batch_size=100,
        train_seconds=192.4,
        images_per_second=1234.4,
        val_accuracy=0.8888,
        test_accuracy=seen.accuracy,
        test_errors=seen.num_errors,
        num_test=seen.num_images,
        test_interval=wilson_interval(seen.num_images - seen.num_errors, seen.num_images),
        test_look=1,
        num_test_looks=1,
        test_accuracy_of_seeds={7: [seen.accuracy]},
        looks_by_dataset={"folder:pets dddddddd": 1},
        dataset_notes=(),
        weights_sha256="e" * 64,
        exported=None,
        machine=MACHINE,
    )


def write_run(folder: Path, epochs: int) -> None:
    fingerprint = Fingerprint.of(
        RECIPES["mnist"], seed=7, image_size=None, dataset_sha256="d" * 64, virtual_shards=None
    )
    config = {
        "fingerprint": fingerprint.values,
        "started_with": {"git_commit": "c" * 40, "world_size": 4, "machine": MACHINE},
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    lines: list[dict[str, Any]] = []
    for epoch in range(1, epochs + 1):
        for step in (100 * epoch - 50, 100 * epoch):
            lines.append({"kind": "step", "step": step, "epoch": epoch, "loss": 20 / step, "accuracy": 1 - 10 / step})
        means = {"train_loss": 1 / epoch, "train_accuracy": 1 - 0.3 / epoch}
        means |= {"val_loss": 1.2 / epoch, "val_accuracy": 1 - 0.4 / epoch, "seconds": 30.0 * epoch}
        lines.append({"kind": "epoch", "step": 100 * epoch, "epoch": epoch, **means})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def report(
    folder: Path,
    classes: tuple[str, ...],
    seen: Evaluation,
    *,
    shape: tuple[int, int, int] = (1, 8, 8),
    epochs: int = 3,
    changes: dict[str, Any] | None = None,
) -> Page:
    write_run(folder, epochs)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (seen.num_images, *shape), generator=generator, dtype=torch.uint8)
    write_report(
        folder, replace(result_of(seen, epochs), **(changes or {})), classes, ImageSet(pixels, seen.labels), seen
    )
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws no figures, for tests of the text alone: they take most of a report's time."""
    monkeypatch.setattr("trainer.report.page._write_figures", lambda *_: None)
    monkeypatch.setattr("trainer.report.page.both_color_schemes", lambda figure: {"light": "", "dark": ""})


def some_mistakes(num_classes: int = 3, num_images: int = 60) -> Evaluation:
    labels = [index % num_classes for index in range(num_images)]
    return evaluation(labels, [(label + (index % 4 == 0)) % num_classes for index, label in enumerate(labels)])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 260, 260), (1, 260, 260)])
def test_the_page_is_self_contained(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    page = report(tmp_path / "run", ("cat", "dog", "owl"), some_mistakes(), shape=shape)
    assert not page.all("script")
    assert not page.all("link")
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset"):
            assert (attributes.get(name) or "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in (tmp_path / "run/report.html").read_text()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "config.json",
        "figures",
        "metrics.jsonl",
        "report.html",
    ]


def test_each_file_of_a_figure_is_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    draw = Figure.draw

    def count(figure: Figure, renderer: Any) -> None:
        drawn.append(figure)
        draw(figure, renderer)

    monkeypatch.setattr(Figure, "draw", count)
    report(tmp_path / "run", ("cat", "dog", "owl"), some_mistakes(), changes={"dataset": "cifar10"})
    files = list((tmp_path / "run/figures").iterdir())
    assert len(drawn) == len(files) + len(("loss", "accuracy", "years, on the page"))


def test_the_numbers_of_the_result_are_shown(tmp_path: Path) -> None:
    seen = some_mistakes(num_images=1200)
    page = report(tmp_path / "run", ("cat", "dog", "owl"), seen)
    low, high = wilson_interval(900, 1200)
    for text in (
        "75.00 % test accuracy: 300 of 1,200 images wrong interval",
        f"interval {100 * low:.2f} – {percent(high)} (Wilson, 96.960 % for evaluation 1, 95 % over all evaluations)",
        "Validation accuracy 88.88 %",
        "Test loss 0.4321",
        "Training time 3 min 12 s",
        "Images a second 1,234",
        "Parameters 105,506",
        "3 epochs in 300 steps of 100 images, from seed 7, by 4 processes",
        "c" * 40,
        "d" * 64,
        "e" * 64,
        "a <fast> one",
        "recipe.param_groups.filters lr 0.1 momentum 0.0",
    ):
        assert text in page.text


@pytest.mark.usefixtures("without_figures")
def test_the_first_evaluation_on_a_test_set_is_distinguished_from_later_ones(tmp_path: Path) -> None:
    seen = some_mistakes()
    first = report(tmp_path / "first", ("a", "b", "c"), seen).text
    assert "This was the first evaluation on this test set" in first
    assert "so the accuracy is an honest estimate." in first
    changes = {"test_look": 4, "num_test_looks": 5}
    text = report(tmp_path / "later", ("a", "b", "c"), seen, changes=changes).text
    assert "Test evaluation 4 of 5" in text
    assert "(Wilson, 99.810 % for evaluation 4, 95 % over all evaluations)" in text
    assert "This was evaluation 4 of 5 on this test set" in text


@pytest.mark.usefixtures("without_figures")
def test_all_seeds_and_all_test_sets_in_the_ledger_are_shown(tmp_path: Path) -> None:
    seen = some_mistakes()
    alone = report(tmp_path / "alone", ("a", "b", "c"), seen).text
    assert "The ledger has" not in alone
    assert "by data set" not in alone
    changes = {
        "test_accuracy_of_seeds": {0: [0.97, 0.975], 7: [0.99], 3: [0.985]},
        "looks_by_dataset": {"mnist d36a8ecd": 3, "cifar10 b42696ed": 1},
    }
    text = report(tmp_path / "several", ("a", "b", "c"), seen, changes=changes).text
    assert "4 evaluated networks with these settings, from 3 seeds: test accuracy worst 97.00 %, median 98.00 %" in text
    assert "by data set: mnist d36a8ecd: 3, cifar10 b42696ed: 1." in text


@pytest.mark.usefixtures("without_figures")
def test_the_figure_with_views_follows_the_headline_of_one_view(tmp_path: Path) -> None:
    seen = some_mistakes(num_images=1200)
    assert " views of each image" not in report(tmp_path / "run", ("a", "b", "c"), seen).text
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["fingerprint"]["recipe"]["test_time_views"] = "mirrored-and-shifted"
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    images = ImageSet(torch.zeros(seen.num_images, 1, 8, 8, dtype=torch.uint8), seen.labels)

    def text_of(result: Result) -> str:
        write_report(tmp_path / "run", result, ("a", "b", "c"), images, seen)
        return Page((tmp_path / "run/report.html").read_text(encoding="utf-8")).text

    views = {"test_errors_with_views": 276, "test_accuracy_with_views": 0.77, "val_accuracy_with_views": 0.9}
    text = text_of(
        replace(result_of(seen, 3), **views, num_averaged_seeds=1, test_accuracy_of_seeds={0: [0.9], 1: [0.8]})
    )
    assert "75.00 % test accuracy: 300 of 1,200 images wrong with 6 views of each image 77.00 %: 276 wrong" in text
    assert (
        "6 views (mirrored-and-shifted) gives a test accuracy of 77.00 % and a validation accuracy of 90.00 %" in text
    )
    assert "Version 0.1 took 1 of these accuracies, with 6 views of each image." in text
    # A result of version 0.1 has one figure, which averages the views.
    old = text_of(result_of(seen, 3))
    assert "300 of 1,200 images wrong, mean of 6 views of each image" in old
    assert "outputs over 6 views of each image (mirrored-and-shifted)" in old


@pytest.mark.usefixtures("without_figures")
def test_warnings_about_the_training_come_first(tmp_path: Path) -> None:
    seen = some_mistakes(num_images=1200)
    page = report(tmp_path / "run", ("a", "b", "c"), seen, changes={"warnings": ("it is <no> good", "one class")})
    assert page.text.startswith(
        "mnist on folder:pets: 75.00 % mnist on folder:pets Warning: it is <no> good. Warning: one class. 75.00 %"
    )
    assert "Warning" not in report(tmp_path / "other", ("a", "b", "c"), seen).text


def balanced(folder: Path, labels: list[int], predicted: list[int]) -> str:
    """The part of the report with the headline, for the classes `many` and `few`."""
    seen, classes = evaluation(labels, predicted), ("many", "few")
    recalls = seen.recall_by_class(classes)
    changes = {"recall_by_class": recalls, "balanced_accuracy": balanced_accuracy(recalls)}
    return report(folder, classes, seen, changes=changes).text.split("Validation accuracy")[0]


@pytest.mark.usefixtures("without_figures")
def test_the_balanced_accuracy_of_unbalanced_classes_follows_the_headline(tmp_path: Path) -> None:
    few_wrong = balanced(tmp_path / "few", [0] * 400 + [1] * 6, [0] * 406)
    assert "98.52 % test accuracy: 6 of 406 images wrong balanced accuracy 50.00 %, the mean recall" in few_wrong
    assert "worst: few , 0.00 %" in few_wrong  # its name is an element of its own
    # Three images against two are 1.5 times as many: not unbalanced, unless the figures differ.
    equal = balanced(tmp_path / "equal", [0] * 90 + [1] * 60, [1] + [0] * 89 + [1] * 59 + [0])
    assert "balanced" not in equal
    ratio = balanced(tmp_path / "ratio", [0] * 91 + [1] * 60, [1] + [0] * 90 + [1] * 59 + [0])
    assert "balanced accuracy 98.62 %" in ratio
    assert "balanced" not in balanced(tmp_path / "all", [0] * 91 + [1] * 60, [0] * 91 + [1] * 60)  # none is wrong
    different = balanced(tmp_path / "different", [0] * 90 + [1] * 60, [0] * 90 + [1] * 50 + [0] * 10)
    assert "balanced accuracy 91.67 %" in different  # 93.33 % of all images


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize(
    ("num_images", "headline"),
    [(6, "56 – 100 %"), (MIN_POINT_IMAGES - 1, "95 – 100 %"), (MIN_POINT_IMAGES, "100.00 %")],
)
def test_the_headline_of_few_test_images_is_the_interval(tmp_path: Path, num_images: int, headline: str) -> None:
    right = [number % 2 for number in range(num_images)]
    changes = {"test_interval": simultaneous_interval(num_images, num_images, 1)}
    page = report(tmp_path / "run", ("cat", "dog"), evaluation(right, right), changes=changes)
    is_interval = num_images < MIN_POINT_IMAGES
    name = "test accuracy, 95 % interval" if is_interval else "test accuracy"
    assert f"{headline} {name}: 0 of {num_images} images wrong" in page.text
    assert page.text.startswith(f"mnist on folder:pets: {headline} mnist on folder:pets {headline}")
    assert ("100.00 % test accuracy" in page.text) == (not is_interval)


def test_a_run_on_cifar10_is_placed_on_the_lectures_curve(tmp_path: Path) -> None:
    page = report(tmp_path / "run", ("a", "b", "c"), some_mistakes(), changes={"dataset": "cifar10"})
    assert "CIFAR-10 through time" in page.text
    drawing = (tmp_path / "run/figures/cifar10-years.svg").read_text()
    for text in ("Graham 2015", "Real et al. 2018", "human performance", "75.00 %"):
        assert text in drawing
    assert "CIFAR-10 through time" not in report(tmp_path / "other", ("a", "b", "c"), some_mistakes()).text


@pytest.mark.usefixtures("without_figures")
def test_notes_on_the_data_set_are_shown(tmp_path: Path) -> None:
    notes = ["folder:/x: no test folder", "warning: folder:/x: 3 of 9 test images are training images, too"]
    page = report(tmp_path / "run", ("cat", "dog"), some_mistakes(2), changes={"dataset_notes": notes})
    assert " ".join(f"{note}." for note in notes) in page.text
    assert "the accuracy is as honest an estimate as the warnings above allow." in page.text


def test_names_of_folders_are_shown_as_text(tmp_path: Path) -> None:
    evil = (
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "\udcff\x01\n$\\frac$ {{ 7*7 }}",
        "می\u200cخواهم \U0001f468\u200d\U0001f467",
    )
    page = report(tmp_path / "run", evil, some_mistakes(4))
    assert not page.all("script")
    assert all((image["src"] or "").startswith("data:image/") for image in page.all("img"))
    assert evil[0] in page.text
    assert "{{ 7*7 }}" in page.text
    assert evil[3] in page.text  # a Persian word and an emoji of several, whose joiners are no harm
    for name in FIGURES:
        ElementTree.parse(tmp_path / f"run/figures/{name}.svg")


@pytest.mark.parametrize("num_classes", [2, 10, 1000])
def test_figures_are_written_in_both_formats(tmp_path: Path, num_classes: int) -> None:
    names = tuple(f"class {number}" for number in range(num_classes))
    report(tmp_path / "run", names, some_mistakes(num_classes))
    for name in FIGURES:
        root = ElementTree.parse(tmp_path / f"run/figures/{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        with Image.open(tmp_path / f"run/figures/{name}.png") as image:
            image.load()
            assert image.format == "PNG"
            assert min(image.size) > 200


def test_names_below_mistakes_do_not_run_into_each_other() -> None:
    shown = ReportedMistake(
        index=0,
        pixels=np.zeros((8, 8), np.uint8),
        label="n01530575 brambling",
        predicted="automobile",
        confidence=0.9999,
        label_probability=0.0001,
    )
    with style():
        figure = draw_mistakes([shown] * 3)
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
        texts = figure.axes[0].texts
        boxes = [text.get_window_extent() for text in texts]
    assert {text.get_text() for text in texts} == {"✗ autom…le: 99 %", "✓ n0153…ng: <1 %"}
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[2:], strict=False))


def test_the_rate_of_an_epoch_is_right_where_lines_before_it_are_lost() -> None:
    """A full disk loses whole lines."""
    figures = {"train_loss": 1.0, "train_accuracy": 0.5}
    epochs = [{"epoch": epoch, "step": 10 * epoch, "seconds": 2.0 * epoch, **figures} for epoch in (2, 3, 6)]
    curves = Curves(steps=[], epochs=epochs, lr_factors=[1.0] * 60, images_per_epoch=100.0)
    with style():
        (stairs,) = draw_curves(curves, "accuracy").axes[1].patches
    assert isinstance(stairs, StepPatch)
    assert stairs.get_data().values.tolist() == [50.0, 50.0, 50.0]
    assert stairs.get_data().edges.tolist() == [0, 2, 3, 6]


def test_matrix_has_a_heading_for_each_row_and_column(tmp_path: Path) -> None:
    seen = evaluation([0, 0, 1, 1, 1], [0, 1, 1, 1, 0])
    report(tmp_path / "run", ("cat", "dog"), seen)
    html = (tmp_path / "run/report.html").read_text()
    table = html[html.index('<table class="matrix') : html.index("Recall by class, worst first")]
    assert re.findall(r'<th scope="row">(\w+)</th>', table) == ["cat", "dog"]
    assert re.findall(r"<td[^>]*>(\d+)</td>", table) == ["1", "1", "1", "2"]
    # Names that begin alike stay different.
    report(tmp_path / "long", ("photographs of old cats", "photographs of old dogs"), seen)
    html = (tmp_path / "long/report.html").read_text()
    table = html[html.index('<table class="matrix') : html.index("Recall by class, worst first")]
    assert re.findall(r'<th scope="row">([^<]+)</th>', table) == ["photographs o…d cats", "photographs o…d dogs"]


def test_many_classes_have_their_worst_pairs_listed(tmp_path: Path) -> None:
    names = tuple(f"class {number}" for number in range(1000))
    labels = [5] * 10 + list(range(100))
    page = report(tmp_path / "run", names, evaluation(labels, [8] * 7 + [5] * 3 + [*range(1, 101)]))
    html = (tmp_path / "run/report.html").read_text()
    assert 'class="matrix' not in html
    pairs = html[html.index("Most confused pairs") : html.index("Recall by class, worst first")]
    assert pairs.count('<th scope="row">') == NUM_PAIRS
    assert "class 5 class 8 7 63.6 %" in page.text  # 7 of the 11 images labelled 5
    assert "The other 970 classes" in page.text


def test_the_most_confident_mistakes_come_first(tmp_path: Path) -> None:
    seen = some_mistakes(num_images=400)
    page = report(tmp_path / "run", ("cat", "dog", "owl"), seen)
    shown = [image["alt"] or "" for image in page.all("img") if (image["alt"] or "").startswith("Test image")]
    numbers = [int(alt.split()[2].rstrip(",")) for alt in shown]
    assert numbers == list(range(396, 396 - 4 * NUM_MISTAKES, -4))
    assert shown[0] == "Test image 396, labelled cat, predicted dog"
    assert all(image["alt"] for image in page.all("img"))


def test_no_mistakes_in_one_epoch(tmp_path: Path) -> None:
    page = report(tmp_path / "run", ("cat", "dog"), evaluation([0, 1, 1], [0, 1, 1]), epochs=1)
    assert "0 of 3 images wrong" in page.text
    assert "None: all 3 test images are classified correctly." in page.text
    assert "1 epoch in 100 steps" in page.text


def test_a_run_whose_metrics_could_not_be_written_has_a_report(tmp_path: Path) -> None:
    ran = {"epochs": 3, "steps": 300}
    page = report(tmp_path / "run", ("cat", "dog"), evaluation([0, 1, 1], [0, 1, 1]), epochs=0, changes=ran)
    assert "metrics.jsonl has no epochs, because it could not be written" in page.text
    assert "0 of 3 images wrong" in page.text


def test_a_class_without_test_images_is_no_failure(tmp_path: Path) -> None:
    page = report(tmp_path / "run", ("cat", "dog", "owl"), evaluation([0, 0, 1], [1, 0, 1]))
    assert "owl 0 – – – no test images" in page.text


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for _ in range(2):
        report(tmp_path / "run", ("cat", "dog", "owl"), some_mistakes())
        files = [path for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()]
        written.append({path.name: path.read_bytes() for path in files})
        shutil.rmtree(tmp_path / "run")
    assert written[0] == written[1]
    assert len(written[0]) == 9


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.919, "91.90 %"), (0.99999, "99.99 %"), (1.0, "100.00 %"), (0.0, "0.00 %"), (0.00001, "<0.01 %")],
)
def test_percent_never_rounds_to_all_or_none(share: float, text: str) -> None:
    assert percent(share) == text


def test_groups_gather_settings_by_path() -> None:
    nested = {"a": {"x": 1, "b": {"y": None, "z": []}, "w": [1, 2]}, "seed": 0}
    assert groups(nested) == {
        "": [("seed", "0")],
        "a": [("x", "1"), ("w", "[1, 2]")],
        "a.b": [("y", "none"), ("z", "none")],
    }
