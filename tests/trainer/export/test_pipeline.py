"""Tests of whole exports of a real run: what is published, and that a failed check publishes nothing."""

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
from tests.trainer.records.results import make_result
from trainer.errors import ExportError
from trainer.export import pipeline
from trainer.export.formats import load_predictor
from trainer.export.manifest import metrics_section
from trainer.export.pipeline import export, export_int8
from trainer.export.reference import ReferenceModel
from trainer.export.repository import ONNX, RepositoryModel
from trainer.loop.run import Run
from trainer.progress import Progress
from trainer.records.checkpoint import weights_sha256

FIGURES = {
    "val_accuracy": 0.9,
    "test_accuracy": 0.875,
    "test_errors": 125,
    "num_test": 1000,
    "test_look": 3,
    "precision": "float32",
}
RESULT = make_result(**FIGURES)


class RecordingProgress(Progress):
    """Keeps the printed lines."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(is_main=True)
        self._lines = lines

    def say(self, line: str) -> None:
        self._lines.append(line)


@pytest.fixture(scope="module")
def printed() -> list[str]:
    return []


@pytest.fixture(scope="module")
def version(run: Run, printed: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported run."""
    labels = tuple(str(digit) for digit in range(10))
    folder = tmp_path_factory.mktemp("models")
    model = RepositoryModel(repository=folder, name="digits", image_shape=(1, 28, 28), labels=labels)
    return export(dataclasses.replace(run, progress=RecordingProgress(printed)), model, RESULT)


@pytest.fixture(scope="module")
def manifest(version: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((version / "manifest.json").read_text())
    return manifest


def test_a_version_holds_every_format_and_its_digest(version: Path, manifest: dict[str, Any]) -> None:
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


def test_the_manifest_records_accuracy_and_parity(manifest: dict[str, Any], reference: ReferenceModel) -> None:
    metrics = manifest["metrics"]
    assert metrics["num_val"] == 150
    assert metrics["val_errors"] == reference.count_errors(reference.logits) < 60
    assert metrics["val_accuracy"] == pytest.approx(1 - metrics["val_errors"] / 150)
    assert metrics["test_time_views"] == "one"
    assert metrics["run"] == {**FIGURES, "test_time_views": "one"}
    parity = manifest["parity"]
    assert (parity["num_validation_images"], parity["num_training_images"]) == (150, 1350)  # the whole data set
    assert parity["formats"].keys() == {"model.onnx", "model.pt", "model.pt2"}
    for results in parity["formats"].values():
        assert {result["batch_size"]: result["num_images"] for result in results} == {
            256: 1500,
            17: 1500,
            3: 1500,
            2: 1500,
            1: 1500,
        }
        assert all(0 <= result["largest_difference"] <= 1e-4 for result in results)


def test_the_manifest_records_the_origin_without_paths(manifest: dict[str, Any], run: Run) -> None:
    origin = manifest["origin"]
    assert origin["run"] == run.folder.path.name
    assert origin["weights_sha256"] == weights_sha256(run.learner.model)
    assert (origin["dataset"], origin["dataset_sha256"]) == ("mnist-mini", run.dataset.sha256)
    assert origin["config"] == run.folder.fingerprint.values
    assert origin["libraries"].keys() == {"torch", "onnx", "onnxscript", "onnxruntime-gpu", "numpy"}
    text = json.dumps(manifest)
    assert str(ROOT) not in text
    assert str(run.folder.path.parent) not in text


def test_the_golden_batch_has_training_images_of_every_class(
    version: Path, run: Run, reference: ReferenceModel
) -> None:
    golden = np.load(version / "golden.npz")
    assert golden.keys() == {"images", "logits"}
    assert (golden["images"].dtype, golden["images"].shape) == (np.uint8, (16, 1, 28, 28))
    assert golden["logits"].dtype == np.float32
    chosen = run.dataset.train.images[run.train_indices].numpy()
    found = [np.flatnonzero((chosen == image).all(axis=(1, 2, 3))) for image in golden["images"]]
    labels = run.dataset.train.labels[run.train_indices].numpy()
    assert {int(labels[indices[0]]) for indices in found} == set(range(10))
    np.testing.assert_array_equal(golden["logits"], reference.golden[1])
    logits, _ = load_predictor(ONNX, (version / "model.onnx").read_bytes())(golden["images"])
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)


def test_each_step_is_printed(version: Path, printed: list[str]) -> None:
    first, second, third = printed
    assert first == "exporting digits: ONNX, TorchScript, torch.export"
    assert second.startswith("every format matches the trained model on 1,500 images: batch sizes 1, 2, 3, 17, 256, ")
    assert third == f"exported to {version}; serve it: python -m serving --model-repository {version.parent.parent}"


def test_a_run_without_a_result_has_no_figures_in_the_manifest(reference: ReferenceModel) -> None:
    assert reference.result is None
    assert metrics_section(reference, reference.logits)["run"] is None


def test_a_format_with_other_outputs_is_not_published(
    run: Run, model: RepositoryModel, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changes one number of a real file: the bias of the third class."""
    changed = onnx.load_from_string(files[ONNX])
    (bias,) = (tensor for tensor in changed.graph.initializer if tensor.name == "network.fc2.bias")
    values = numpy_helper.to_array(bias).copy()
    values[2] += 0.001
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    monkeypatch.setattr(pipeline, "convert", lambda *_: {**files, ONNX: changed.SerializeToString()})
    with pytest.raises(ExportError, match=r"^model\.onnx at batch size 256 .* image \d+.*, the trained model"):
        export(run, model, None)
    assert not model.repository.exists()


@pytest.fixture
def converted_to_onnx(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reuses the float32 ONNX file that the fixture `files` has already converted."""
    monkeypatch.setattr(pipeline, "convert_to_onnx", lambda *_: files[ONNX])


@pytest.mark.usefixtures("converted_to_onnx")
def test_int8_is_published_with_its_accuracy_and_that_of_float32(
    run: Run, model: RepositoryModel, reference: ReferenceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "MAX_ACCURACY_LOSS", 0.05)  # 0.1 points of 150 images is less than one image
    version = export_int8(run, model, RESULT)
    assert {path.name for path in version.iterdir()} == {"model.onnx", "golden.npz", "manifest.json"}
    manifest = json.loads((version / "manifest.json").read_text())
    assert manifest["precision"] == "int8"
    metrics = manifest["metrics"]
    assert metrics["float32"]["val_errors"] == reference.count_errors(reference.logits)
    assert metrics["val_errors"] <= metrics["float32"]["val_errors"] + 0.05 * 150
    assert metrics["run"]["test_look"] == 3
    golden = np.load(version / "golden.npz")
    np.testing.assert_array_equal(golden["logits"], reference.golden[1])  # the trained model's, not those of int8
    logits, _ = load_predictor(ONNX, (version / "model.onnx").read_bytes())(golden["images"])
    assert 1e-4 < 2 * np.abs(logits - golden["logits"]).max() == pytest.approx(manifest["golden_tolerance"])
    assert manifest["parity"]["tolerance"] >= manifest["golden_tolerance"] / 2
    content = (version / "model.onnx").read_bytes()
    assert len(content) < 0.35 * 423_844
    assert os.fsencode(ROOT) not in content


@pytest.mark.usefixtures("converted_to_onnx")
def test_int8_that_loses_too_much_is_not_published(
    run: Run, model: RepositoryModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "MAX_ACCURACY_LOSS", -1.0)
    with pytest.raises(ExportError, match=r"^digits is not published: \d+ of 150 validation images wrong in int8, "):
        export_int8(run, model, None)
    assert not model.repository.exists()
