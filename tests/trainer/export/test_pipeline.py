"""A whole export of a real run: what is published, and that nothing is when something is wrong."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.conftest import ROOT
from trainer.errors import ExportError
from trainer.export import pipeline
from trainer.export.formats import open_format
from trainer.export.pipeline import export, export_int8
from trainer.export.repository import ONNX, Model
from trainer.export.trained import Trained
from trainer.loop.fit import Run
from trainer.progress import Progress
from trainer.records.checkpoint import weights_sha256

RESULT = {
    "val_accuracy": 0.9,
    "test_accuracy": 0.875,
    "test_errors": 125,
    "num_test": 1000,
    "test_look": 3,
    "precision": "float32",
}


class Listener(Progress):
    """Keeps what is said."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(is_main=True)
        self._lines = lines

    def say(self, line: str) -> None:
        self._lines.append(line)


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def version(run: Run, said: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, exported."""
    labels = tuple(str(digit) for digit in range(10))
    folder = tmp_path_factory.mktemp("models")
    model = Model(repository=folder, name="digits", image_shape=(1, 28, 28), labels=labels)
    return export(dataclasses.replace(run, progress=Listener(said)), model, RESULT)


@pytest.fixture(scope="module")
def manifest(version: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((version / "manifest.json").read_text())
    return manifest


def test_a_version_has_every_format_with_its_digest(version: Path, manifest: dict[str, Any]) -> None:
    assert version.name == "1"
    names = {"model.onnx", "model.pt", "model.pt2", "golden.npz"}
    assert {path.name for path in version.iterdir()} == names | {"manifest.json"}
    assert manifest["files"].keys() == names
    for name, known in manifest["files"].items():
        content = (version / name).read_bytes()
        assert known == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def test_the_manifest_tells_the_contract(manifest: dict[str, Any]) -> None:
    assert (manifest["format_version"], manifest["name"], manifest["version"]) == (1, "digits", 1)
    assert manifest["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 1, 28, 28]}]
    assert manifest["outputs"] == [
        {"name": name, "datatype": "FP32", "shape": [-1, 10]} for name in ("logits", "probabilities")
    ]
    assert manifest["labels"] == [str(digit) for digit in range(10)]
    assert manifest["normalization"]["inside_the_model"] is True
    assert manifest["normalization"]["mean"] == pytest.approx([33.3], abs=1)
    assert manifest["normalization"]["deviation"] == pytest.approx([78.6], abs=1)
    assert manifest["precision"] == "float32"
    assert manifest["golden_tolerance"] == 1e-4


def test_the_manifest_tells_how_good_the_model_is_and_how_that_was_seen(
    manifest: dict[str, Any], trained: Trained
) -> None:
    metrics = manifest["metrics"]
    assert metrics["num_val"] == 150
    assert metrics["val_errors"] == trained.num_errors(trained.logits) < 60
    assert metrics["val_accuracy"] == pytest.approx(1 - metrics["val_errors"] / 150)
    assert metrics["test_time_views"] == "one"
    assert metrics["run"] == {**RESULT, "test_time_views": "one"}
    parity = manifest["parity"]
    assert (parity["num_validation_images"], parity["num_training_images"]) == (150, 1350)  # the whole data set
    assert parity["formats"].keys() == {"model.onnx", "model.pt", "model.pt2"}
    for agreements in parity["formats"].values():
        assert {a["batch_size"]: a["num_images"] for a in agreements} == {
            256: 1500,
            17: 1500,
            3: 1500,
            2: 1500,
            1: 1500,
        }
        assert all(0 <= a["largest_difference"] <= 1e-4 for a in agreements)


def test_the_manifest_tells_where_the_model_comes_from_but_no_path(manifest: dict[str, Any], run: Run) -> None:
    origin = manifest["origin"]
    assert origin["run"] == run.folder.path.name
    assert origin["weights_sha256"] == weights_sha256(run.learner.model)
    assert (origin["dataset"], origin["dataset_sha256"]) == ("mnist-mini", run.dataset.sha256)
    assert origin["config"] == run.folder.fingerprint.values
    assert origin["libraries"].keys() == {"torch", "onnx", "onnxscript", "onnxruntime-gpu", "numpy"}
    text = json.dumps(manifest)
    assert str(ROOT) not in text
    assert str(run.folder.path.parent) not in text


def test_the_golden_batch_is_training_images_of_every_class(version: Path, run: Run, trained: Trained) -> None:
    golden = np.load(version / "golden.npz")
    assert golden.keys() == {"images", "logits"}
    assert (golden["images"].dtype, golden["images"].shape) == (np.uint8, (16, 1, 28, 28))
    assert golden["logits"].dtype == np.float32
    chosen = run.dataset.train.images[run.train_indices].numpy()
    found = [np.flatnonzero((chosen == image).all(axis=(1, 2, 3))) for image in golden["images"]]
    labels = run.dataset.train.labels[run.train_indices].numpy()
    assert {int(labels[indices[0]]) for indices in found} == set(range(10))
    np.testing.assert_array_equal(golden["logits"], trained.golden[1])
    logits, _ = open_format(ONNX, (version / "model.onnx").read_bytes())(golden["images"])
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)


def test_what_is_done_is_said(version: Path, said: list[str]) -> None:
    first, second, third = said
    assert first == "exporting digits: ONNX, TorchScript, torch.export"
    assert second.startswith("all formats answer 1,500 images as the trained model does: batches of 1, 2, 3, 17, 256, ")
    assert third == f"exported to {version}; serve it: python -m serving --model-repository {version.parent.parent}"


def test_a_run_without_a_result_has_no_figures_of_its_own(trained: Trained) -> None:
    assert trained.result is None
    assert trained.metrics(trained.logits)["run"] is None


def test_a_format_that_answers_otherwise_is_not_published(
    run: Run, model: Model, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real file with one number changed: the third class's bias."""
    changed = onnx.load_from_string(files[ONNX])
    (bias,) = (tensor for tensor in changed.graph.initializer if tensor.name == "network.fc2.bias")
    values = numpy_helper.to_array(bias).copy()
    values[2] += 0.001
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    monkeypatch.setattr(pipeline, "convert", lambda *_: {**files, ONNX: changed.SerializeToString()})
    with pytest.raises(ExportError, match=r"^model\.onnx at batch size 256 .* image \d+ .*, the trained model"):
        export(run, model, None)
    assert not model.repository.exists()


@pytest.fixture
def onnx_alone(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 is made of the model in ONNX, which is there already."""
    monkeypatch.setattr(pipeline, "convert_to_onnx", lambda *_: files[ONNX])


@pytest.mark.usefixtures("onnx_alone")
def test_int8_is_published_with_both_accuracies(
    run: Run, model: Model, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "LARGEST_LOSS", 0.05)  # a tenth of a point of 150 images is none at all
    version = export_int8(run, model, RESULT)
    assert {path.name for path in version.iterdir()} == {"model.onnx", "golden.npz", "manifest.json"}
    manifest = json.loads((version / "manifest.json").read_text())
    assert manifest["precision"] == "int8"
    metrics = manifest["metrics"]
    assert metrics["float32"]["val_errors"] == trained.num_errors(trained.logits)
    assert metrics["val_errors"] <= metrics["float32"]["val_errors"] + 0.05 * 150
    assert metrics["run"]["test_look"] == 3
    golden = np.load(version / "golden.npz")
    np.testing.assert_array_equal(golden["logits"], trained.golden[1])  # of the trained model, not of int8
    logits, _ = open_format(ONNX, (version / "model.onnx").read_bytes())(golden["images"])
    assert 1e-4 < 2 * np.abs(logits - golden["logits"]).max() == pytest.approx(manifest["golden_tolerance"])
    assert manifest["parity"]["tolerance"] >= manifest["golden_tolerance"] / 2
    content = (version / "model.onnx").read_bytes()
    assert len(content) < 0.35 * 423_844
    assert os.fsencode(ROOT) not in content


@pytest.mark.usefixtures("onnx_alone")
def test_int8_that_loses_too_much_is_not_published(run: Run, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "LARGEST_LOSS", -1.0)
    with pytest.raises(ExportError, match=r"^digits is not published: \d+ of 150 validation images wrong in int8, "):
        export_int8(run, model, None)
    assert not model.repository.exists()
