"""The page of a run, read back with an HTML parser; the figures, read back as what they are."""

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from trainer.data import ImageSet
from trainer.evaluation.evaluate import Evaluation
from trainer.evaluation.intervals import wilson_interval
from trainer.report.figures import percent
from trainer.report.page import NUM_MISTAKES, NUM_PAIRS, groups, write_report

MACHINE = {"device": "a <fast> one", "cpus": 2, "python": "3.11.7", "torch": "2.15.0"}
SCHEDULE = {"points": [[0.0, 1.0], [1.0, 0.0]]}
RULE = {"lr": 0.1, "momentum": 0.0}
FIGURES = ("curves", "confusion", "mistakes")


class Page(HTMLParser):
    """What a reader and a browser get: the text, and every attribute of every element."""

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
    """The later an image, the surer the model."""
    confidence = torch.linspace(0.5, 0.99, len(labels))
    wrong = torch.tensor(labels) != torch.tensor(predicted)
    return Evaluation(
        labels=torch.tensor(labels),
        predicted=torch.tensor(predicted),
        confidence=confidence,
        label_probability=torch.where(wrong, (1 - confidence) / 2, confidence),
        loss=0.4321,
    )


def result_of(seen: Evaluation, epochs: int) -> dict[str, Any]:
    return {
        "recipe": "mnist",
        "dataset": "folder:pets",
        "dataset_sha256": "d" * 64,
        "model": "lecture",
        "num_parameters": 105_506,
        "world_size": 4,
        "device": "cpu",
        "precision": "float32",
        "seed": 7,
        "epochs": epochs,
        "steps": 100 * epochs,
        "global_batch_size": 100,
        "train_seconds": 192.4,
        "images_per_second": 1234.4,
        "val_accuracy": 0.8888,
        "test_accuracy": seen.accuracy,
        "test_errors": seen.num_errors,
        "num_test": seen.num_images,
        "test_interval": wilson_interval(seen.num_images - seen.num_errors, seen.num_images),
        "test_look": 1,
        "num_test_looks": 1,
        "test_accuracy_of_seeds": {7: [seen.accuracy]},
        "looks_by_dataset": {"folder:pets dddddddd": 1},
        "dataset_notes": [],
        "weights_sha256": "e" * 64,
        "exported": None,
        "machine": MACHINE,
    }


def write_run(folder: Path, epochs: int) -> None:
    recipe = {"name": "mnist", "rules": {"filters": RULE}, "schedule": SCHEDULE, "widths": []}
    config = {
        "fingerprint": {"recipe": recipe, "seed": 7, "image_size": None, "dataset_sha256": "d" * 64},
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
    write_report(folder, result_of(seen, epochs) | (changes or {}), classes, ImageSet(pixels, seen.labels), seen)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def some_mistakes(num_classes: int = 3, num_images: int = 60) -> Evaluation:
    labels = [index % num_classes for index in range(num_images)]
    return evaluation(labels, [(label + (index % 4 == 0)) % num_classes for index, label in enumerate(labels)])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 260, 260), (1, 260, 260)])
def test_is_one_page_that_needs_nothing_else(tmp_path: Path, shape: tuple[int, int, int]) -> None:
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


def test_says_the_numbers_of_the_result(tmp_path: Path) -> None:
    seen = some_mistakes(num_images=1200)
    text = report(tmp_path / "run", ("cat", "dog", "owl"), seen).text
    low, high = wilson_interval(900, 1200)
    for said in (
        "75.00 % test accuracy: 300 of 1,200 images wrong",
        f"interval {percent(low)} to {percent(high)} (Wilson, at 96.960 % for look 1: 95 % over all looks)",
        "Validation accuracy 88.88 %",
        "Test loss 0.4321",
        "Training time 3 min 12 s",
        "Images a second 1,234",
        "Parameters 105,506",
        "3 epochs, 300 steps of 100 images, from seed 7, by 4 processes",
        "c" * 40,
        "d" * 64,
        "e" * 64,
        "a <fast> one",
        "recipe.rules.filters lr 0.1 momentum 0.0",
    ):
        assert said in text


def test_tells_the_first_look_from_later_ones(tmp_path: Path) -> None:
    seen = some_mistakes()
    assert "first look at this test set" in report(tmp_path / "first", ("a", "b", "c"), seen).text
    changes = {"test_look": 4, "num_test_looks": 5}
    text = report(tmp_path / "later", ("a", "b", "c"), seen, changes=changes).text
    assert "Look at this test set 4 of 5" in text
    assert "(Wilson, at 99.810 % for look 4: 95 % over all looks)" in text
    assert "look 4 at this test set, and the ledger of this folder of runs held 5 then" in text


def test_shows_all_seeds_and_all_test_sets_that_were_looked_at(tmp_path: Path) -> None:
    seen = some_mistakes()
    alone = report(tmp_path / "alone", ("a", "b", "c"), seen).text
    assert "that were looked at" not in alone
    assert "by data set" not in alone
    changes = {
        "test_accuracy_of_seeds": {0: [0.97, 0.975], 7: [0.99], 3: [0.985]},
        "looks_by_dataset": {"mnist d36a8ecd": 3, "cifar10 b42696ed": 1},
    }
    text = report(tmp_path / "several", ("a", "b", "c"), seen, changes=changes).text
    assert "4 trained networks that were looked at, from 3 seeds: test accuracy worst 97.00 %, median 98.00 %" in text
    assert "by data set: mnist d36a8ecd: 3, cifar10 b42696ed: 1." in text


def test_a_run_on_cifar10_is_placed_on_the_lectures_curve(tmp_path: Path) -> None:
    page = report(tmp_path / "run", ("a", "b", "c"), some_mistakes(), changes={"dataset": "cifar10"})
    assert "CIFAR-10 through time" in page.text
    drawing = (tmp_path / "run/figures/cifar10-years.svg").read_text()
    for said in ("Graham 2015", "Real et al. 2018", "human performance", "75.00 %"):
        assert said in drawing
    assert "CIFAR-10 through time" not in report(tmp_path / "other", ("a", "b", "c"), some_mistakes()).text


def test_what_is_known_of_the_data_is_told(tmp_path: Path) -> None:
    notes = ["folder:/x: no test folder", "warning: folder:/x: 3 of 9 test images are training images, too"]
    page = report(tmp_path / "run", ("cat", "dog"), some_mistakes(2), changes={"dataset_notes": notes})
    assert " ".join(f"{note}." for note in notes) in page.text
    assert "the figure is no better than the warnings above let it be." in page.text


def test_names_of_folders_are_shown_as_text(tmp_path: Path) -> None:
    evil = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "\udcff\x01\n$\\frac$ {{ 7*7 }}")
    page = report(tmp_path / "run", evil, some_mistakes())
    assert not page.all("script")
    assert all((image["src"] or "").startswith("data:image/") for image in page.all("img"))
    assert evil[0] in page.text
    assert "{{ 7*7 }}" in page.text
    for name in FIGURES:
        ElementTree.parse(tmp_path / f"run/figures/{name}.svg")


@pytest.mark.parametrize("num_classes", [2, 10, 1000])
def test_figures_are_there_in_both_formats(tmp_path: Path, num_classes: int) -> None:
    names = tuple(f"class {number}" for number in range(num_classes))
    report(tmp_path / "run", names, some_mistakes(num_classes))
    for name in FIGURES:
        root = ElementTree.parse(tmp_path / f"run/figures/{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        with Image.open(tmp_path / f"run/figures/{name}.png") as image:
            image.load()
            assert image.format == "PNG"
            assert min(image.size) > 200


def test_matrix_has_a_heading_for_each_row_and_column(tmp_path: Path) -> None:
    seen = evaluation([0, 0, 1, 1, 1], [0, 1, 1, 1, 0])
    report(tmp_path / "run", ("cat", "dog"), seen)
    html = (tmp_path / "run/report.html").read_text()
    table = html[html.index('<table class="matrix') : html.index("Class by class")]
    assert re.findall(r'<th scope="row">(\w+)</th>', table) == ["cat", "dog"]
    assert re.findall(r"<td[^>]*>(\d+)</td>", table) == ["1", "1", "1", "2"]


def test_many_classes_have_their_worst_pairs_listed(tmp_path: Path) -> None:
    names = tuple(f"class {number}" for number in range(1000))
    labels = [5] * 10 + list(range(100))
    page = report(tmp_path / "run", names, evaluation(labels, [8] * 7 + [5] * 3 + [*range(1, 101)]))
    html = (tmp_path / "run/report.html").read_text()
    assert 'class="matrix' not in html
    pairs = html[html.index("Most confused pairs") : html.index("Class by class")]
    assert pairs.count('<th scope="row">') == NUM_PAIRS
    assert "class 5 class 8 7 63.6 %" in page.text  # 7 of the 11 images labelled 5
    assert "The other 970 classes" in page.text


def test_shows_the_surest_mistakes_first(tmp_path: Path) -> None:
    seen = some_mistakes(num_images=400)
    page = report(tmp_path / "run", ("cat", "dog", "owl"), seen)
    shown = [image["alt"] or "" for image in page.all("img") if (image["alt"] or "").startswith("Test image")]
    numbers = [int(alt.split()[2].rstrip(",")) for alt in shown]
    assert numbers == list(range(396, 396 - 4 * NUM_MISTAKES, -4))
    assert shown[0] == "Test image 396, labelled cat, taken for dog"
    assert all(image["alt"] for image in page.all("img"))


def test_no_mistakes_in_one_epoch(tmp_path: Path) -> None:
    page = report(tmp_path / "run", ("cat", "dog"), evaluation([0, 1, 1], [0, 1, 1]), epochs=1)
    assert "100.00 % test accuracy: 0 of 3 images wrong" in page.text
    assert "None: all 3 test images are classified right." in page.text
    assert "1 epoch, 100 steps" in page.text


def test_a_run_whose_metrics_could_not_be_written_has_a_report(tmp_path: Path) -> None:
    ran = {"epochs": 3, "steps": 300}
    page = report(tmp_path / "run", ("cat", "dog"), evaluation([0, 1, 1], [0, 1, 1]), epochs=0, changes=ran)
    assert "metrics.jsonl has no line of an epoch, because it could not be written" in page.text
    assert "100.00 % test accuracy: 0 of 3 images wrong" in page.text


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
    ("share", "said"),
    [(0.919, "91.90 %"), (0.99999, "99.99 %"), (1.0, "100.00 %"), (0.0, "0.00 %"), (0.00001, "<0.01 %")],
)
def test_percent_never_rounds_to_all_or_none(share: float, said: str) -> None:
    assert percent(share) == said


def test_groups_gather_settings_by_path() -> None:
    nested = {"a": {"x": 1, "b": {"y": None, "z": []}, "w": [1, 2]}, "seed": 0}
    assert groups(nested) == {
        "": [("seed", "0")],
        "a": [("x", "1"), ("w", "[1, 2]")],
        "a.b": [("y", "none"), ("z", "none")],
    }
