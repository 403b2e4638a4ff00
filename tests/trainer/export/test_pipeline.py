"""Tests of whole exports of a real run: the published files, and that a failed check publishes nothing."""

import base64
import copy
import hashlib
import json
import os
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from convoy.preprocessing import Preprocessing
from tests.conftest import ROOT
from tests.trainer.records.results import make_result
from trainer.errors import ExportError
from trainer.evaluation.views import NUM_VIEWS, average_views
from trainer.export import manifest as manifest_module
from trainer.export import pipeline, quantize
from trainer.export.formats import FloatArray, convert_to_onnx, load_predictor
from trainer.export.manifest import metrics_section
from trainer.export.parity import reference_logits
from trainer.export.pipeline import export, export_int8
from trainer.export.plan import ExportOptions
from trainer.export.quality import MCNEMAR, Correctness, QualityError
from trainer.export.reference import ReferenceModel
from trainer.export.repository import ONNX, RepositoryModel
from trainer.loop.run import Run
from trainer.progress import Progress
from trainer.recipes import TestTimeViews
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
OPTIONS = ExportOptions(device=torch.device("cpu"))


def count_errors(reference: ReferenceModel) -> int:
    """Returns how many validation images the trained model gets wrong."""
    labels = reference.parity_images.labels[: reference.parity_images.num_validation]
    return int((reference.logits[: len(labels)].argmax(axis=1) != labels).sum())


class RecordingProgress(Progress):
    """Records the lines instead of printing them."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(is_main=True)
        self._lines = lines

    def log(self, line: str) -> None:
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
    return export(replace(run, progress=RecordingProgress(printed)), model, RESULT, OPTIONS)


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


def test_the_manifest_describes_inputs_outputs_and_preprocessing(manifest: dict[str, Any]) -> None:
    assert (manifest["format_version"], manifest["name"], manifest["version"]) == (1, "digits", 1)
    assert manifest["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 1, 28, 28]}]
    assert manifest["outputs"] == [
        {"name": name, "datatype": "FP32", "shape": [-1, 10]} for name in ("logits", "probabilities")
    ]
    assert manifest["labels"] == [str(digit) for digit in range(10)]
    assert manifest["preprocessing"] == Preprocessing().to_json()
    assert manifest["normalization"]["inside_the_model"] is True
    assert manifest["normalization"]["mean"] == pytest.approx([33.3], abs=1)
    assert manifest["normalization"]["deviation"] == pytest.approx([78.6], abs=1)
    assert manifest["precision"] == "float32"
    assert 1e-4 <= manifest["golden_tolerance"] < 2e-4


def test_the_manifest_records_accuracy_and_parity(manifest: dict[str, Any], reference: ReferenceModel) -> None:
    metrics = manifest["metrics"]
    assert metrics["num_val"] == 150
    assert metrics["val_errors"] == count_errors(reference) < 60
    assert metrics["val_accuracy"] == pytest.approx(1 - metrics["val_errors"] / 150)
    assert metrics["test_time_views"] == "one"
    assert metrics["run"] == {**FIGURES, "test_time_views": "one", "warnings": []}
    parity = manifest["parity"]
    assert (parity["num_validation_images"], parity["num_training_images"]) == (150, 850)
    assert parity["plan"]["name"] == "default"
    assert parity["plan"]["num_images_of_small_batches"] == 256
    assert parity["formats"].keys() == {"model.onnx", "model.pt", "model.pt2"}
    for results in parity["formats"].values():
        assert [result["batch_size"] for result in results] == [256, 17, 3, 2, 1]
        assert [result["num_images"] for result in results] == [1000, 256, 256, 256, 256]
        assert all(0 <= result["largest_difference"] <= 1e-4 for result in results)


def test_the_manifest_records_the_origin_without_paths(manifest: dict[str, Any], run: Run) -> None:
    origin = manifest["origin"]
    assert origin["run"] == run.folder.path.name
    assert origin["weights_sha256"] == weights_sha256(run.learner.model)
    assert (origin["dataset"], origin["dataset_sha256"]) == ("mnist-mini", run.dataset.sha256)
    assert origin["config"] == run.folder.fingerprint.values
    assert origin["libraries"].keys() - {"onnxruntime-gpu", "onnxruntime"} == {"torch", "onnx", "onnxscript", "numpy"}
    assert origin["libraries"].keys() & {"onnxruntime-gpu", "onnxruntime"}
    text = json.dumps(manifest)
    assert str(ROOT) not in text
    assert str(run.folder.path.parent) not in text


@pytest.mark.parametrize("installed", ["onnxruntime", "onnxruntime-gpu"])
def test_either_package_of_onnx_runtime_will_do(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name.startswith("onnxruntime") and name != installed:
            raise PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr("trainer.export.manifest.installed_version", version)
    assert manifest_module._versions() == dict.fromkeys(("torch", "onnx", "onnxscript", installed, "numpy"), "1.2.3")


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


def test_each_step_is_logged(version: Path, printed: list[str]) -> None:
    first, second, third, fourth = (line for line in printed if not line.startswith("checking "))
    assert first == "exporting digits: ONNX, TorchScript, torch.export"
    assert second.endswith(" % of 150 validation images right; digits has no earlier version")
    assert third.startswith("every format matches the trained model on 1,000 images: batch sizes 1, 2, 3, 17, 256, ")
    assert fourth == f"exported to {version}; serve it: convoy serve --model-repository {version.parent.parent}"


def test_a_run_without_a_result_has_no_figures_in_the_manifest(reference: ReferenceModel) -> None:
    assert reference.result is None
    right = np.ones(150, dtype=bool)
    assert (
        metrics_section(reference, Correctness.of(right, reference.parity_images.validation_sha256, 150))["run"] is None
    )


def test_a_format_with_other_outputs_is_not_published(
    run: Run, model: RepositoryModel, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test changes one number of a real file: the bias of the third class."""
    changed = onnx.load_from_string(files[ONNX])
    (bias,) = (tensor for tensor in changed.graph.initializer if tensor.name == "network.fc2.bias")
    values = numpy_helper.to_array(bias).copy()
    values[2] += 0.001
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    monkeypatch.setattr(pipeline, "convert", lambda *_: {**files, ONNX: changed.SerializeToString()})
    with pytest.raises(ExportError, match=r"^model\.onnx at batch size 256 .* image \d+.*, the trained model"):
        export(run, model, None, OPTIONS)
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
    version = export_int8(run, model, RESULT, OPTIONS)
    assert {path.name for path in version.iterdir()} == {"model.onnx", "golden.npz", "manifest.json"}
    manifest = json.loads((version / "manifest.json").read_text())
    assert manifest["precision"] == "int8"
    metrics = manifest["metrics"]
    assert metrics["float32"]["val_errors"] == count_errors(reference)
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
def test_int8_that_differs_in_nothing_may_still_round(
    run: Run, model: RepositoryModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits of a network that answers every image alike are those of float32, and its probabilities nearly."""
    monkeypatch.setattr(quantize, "quantize", lambda float32, _batches: float32)
    monkeypatch.setattr(pipeline, "largest_difference", lambda a, b: 0.0)
    assert (export_int8(run, model, None, OPTIONS) / ONNX).exists()


@pytest.mark.usefixtures("converted_to_onnx")
def test_int8_that_loses_too_much_is_not_published(
    run: Run, model: RepositoryModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "MAX_ACCURACY_LOSS", -1.0)
    with pytest.raises(ExportError, match=r"^digits is not published: \d+ of 150 validation images wrong in int8, "):
        export_int8(run, model, None, OPTIONS)
    assert not model.repository.exists()


def spoilt(run: Run, amount: float, lines: list[str] | None = None) -> Run:
    """Returns a run with random numbers added to its last layer; with an infinite amount, it predicts one class."""
    model = copy.deepcopy(run.learner.model)
    last = model.get_submodule("network.fc2")
    assert isinstance(last, torch.nn.Linear)
    if amount == np.inf:
        last.weight.data.zero_()
        last.bias.data.copy_(torch.tensor([0, 0, 5.0, 0, 0, 0, 0, 0, 0, 0]))
    else:
        last.weight.data += amount * torch.randn(last.weight.shape, generator=torch.Generator().manual_seed(0))
    progress = RecordingProgress([] if lines is None else lines)
    return replace(run, learner=replace(run.learner, model=model), progress=progress)


@pytest.fixture
def onnx_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the formats that quality does not depend on."""
    monkeypatch.setattr(pipeline, "convert", lambda *arguments: {ONNX: convert_to_onnx(*arguments)})


@pytest.fixture
def converted(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reuses the run's ONNX file and leaves out the other formats."""
    monkeypatch.setattr(pipeline, "convert", lambda *_: {ONNX: files[ONNX]})


def quality_of(version: Path) -> dict[str, Any]:
    quality: dict[str, Any] = json.loads((version / "manifest.json").read_text())["quality"]
    return quality


@pytest.mark.usefixtures("onnx_alone")
def test_only_promote_publishes_a_clearly_worse_model(run: Run, model: RepositoryModel) -> None:
    assert quality_of(export(run, model, None, OPTIONS))["compared_with"] is None
    lines: list[str] = []
    worse = spoilt(run, 1.0, lines)
    with pytest.raises(QualityError) as refused:
        export(worse, model, None, OPTIONS)
    message = str(refused.value)
    assert message.startswith("digits is not published: it is clearly worse: ")
    assert "of 150 validation images right, version 1 of digits " in message
    assert f"{MCNEMAR}, p = " in message
    assert message.endswith("; --promote publishes it all the same")
    assert "\n" not in message
    assert sorted(path.name for path in model.path.iterdir()) == ["1", "config.pbtxt", "labels.txt"]
    version = export(worse, model, None, replace(OPTIONS, promote=True))
    assert version.name == "2"
    assert any(line.startswith("warning: --promote publishes digits, although it is clearly worse: ") for line in lines)
    quality = quality_of(version)
    assert (quality["compared_with"], quality["test"], quality["num_images"]) == (1, MCNEMAR, 150)
    assert quality["p"] < 0.05
    assert quality["is_clearly_worse"] is True
    assert quality["promoted"] is True
    assert quality["became_wrong"] - quality["became_right"] == round(
        150 * (quality["earlier_accuracy"] - quality["accuracy"])
    )
    # A better one needs no option; nor does the same again.
    for compared_with in (2, 3):
        quality = quality_of(export(run, model, None, OPTIONS))
        assert (quality["compared_with"], quality["is_clearly_worse"], quality["promoted"]) == (
            compared_with,
            False,
            False,
        )
        assert quality["objection"] is None
    assert (quality["became_wrong"], quality["became_right"], quality["p"]) == (0, 0, 1.0)


@pytest.mark.usefixtures("onnx_alone")
def test_a_better_version_that_another_run_publishes_meanwhile_keeps_a_worse_one_out(
    run: Run, model: RepositoryModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_golden = pipeline.golden_file

    def after_another_export(*golden: Any) -> bytes:
        monkeypatch.setattr(pipeline, "golden_file", compute_golden)
        export(run, model, None, OPTIONS)
        return compute_golden(*golden)

    monkeypatch.setattr(pipeline, "golden_file", after_another_export)
    lines: list[str] = []
    with pytest.raises(QualityError, match=r"clearly worse: .* version 1 of digits "):
        export(spoilt(run, 1.0, lines), model, None, OPTIONS)
    assert any(line.endswith("digits has no earlier version") for line in lines)
    assert sorted(path.name for path in model.path.iterdir()) == ["1", "config.pbtxt", "labels.txt"]


@pytest.mark.usefixtures("onnx_alone")
def test_the_tolerance_grows_with_the_logits(run: Run, model: RepositoryModel) -> None:
    """A float32 of a thousand has a resolution of 6e-5, and a network adds up many."""
    large = spoilt(run, 0.0)
    large.learner.model.get_parameter("network.fc2.weight").data.mul_(1000)
    manifest = json.loads((export(large, model, None, OPTIONS) / "manifest.json").read_text())
    differences = [result["largest_difference"] for result in manifest["parity"]["formats"]["model.onnx"]]
    assert 1e-4 < max(differences) <= manifest["parity"]["tolerance"]
    golden = np.load(model.path / "1" / "golden.npz")["logits"]
    assert 1e-5 * np.abs(golden).max() <= manifest["golden_tolerance"] < 2e-5 * np.abs(golden).max()


@pytest.mark.usefixtures("onnx_alone")
def test_only_promote_publishes_a_model_that_predicts_one_class(run: Run, model: RepositoryModel) -> None:
    """The first version of a model has none to be compared with."""
    constant = spoilt(run, np.inf)
    with pytest.raises(QualityError, match=r"assigns every image to the class '2', which gets \d+\.\d+ % of 150 "):
        export(constant, model, None, OPTIONS)
    assert not model.path.exists()
    quality = quality_of(export(constant, model, None, replace(OPTIONS, promote=True)))
    assert "the class '2'" in quality["objection"]
    assert quality["promoted"] is True


@pytest.mark.usefixtures("converted_to_onnx")
def test_int8_is_compared_with_int8(run: Run, model: RepositoryModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "MAX_ACCURACY_LOSS", 1.0)
    perfect = Correctness.of(np.ones(1000, dtype=bool), "other images", 1000)
    old = {"labels": model.labels, "metrics": {"num_val": 1000, "val_errors": 0}, "validation": perfect.to_json()}
    model.publish({ONNX: b""}, lambda version: json.dumps(old).encode())
    with pytest.raises(QualityError, match=r"digits is not published: it is clearly worse: .* % of 150 .*intervals"):
        export_int8(run, model, None, OPTIONS)
    version = export_int8(run, model, None, replace(OPTIONS, promote=True))
    assert quality_of(version)["promoted"] is True


def test_the_manifest_records_the_correctness_of_each_validation_image(
    manifest: dict[str, Any], reference: ReferenceModel
) -> None:
    validation = manifest["validation"]
    assert (validation["sha256"], validation["num_images"]) == (reference.parity_images.validation_sha256, 150)
    right = np.unpackbits(np.frombuffer(base64.b64decode(validation["right"]), np.uint8))[:150]
    expected = reference.logits[:150].argmax(axis=1) == reference.parity_images.labels[:150]
    np.testing.assert_array_equal(right, expected)


def test_exported_views_are_averaged_in_every_format(
    run: Run, model: RepositoryModel, reference: ReferenceModel
) -> None:
    lines: list[str] = []
    views: TestTimeViews = "mirrored-and-shifted"
    of_views = replace(run, recipe=replace(run.recipe, test_time_views=views), progress=RecordingProgress(lines))
    result = replace(RESULT, test_errors_with_views=120, test_accuracy_with_views=0.88, val_accuracy_with_views=0.91)
    version = export(of_views, model, result, replace(OPTIONS, export_views=True))
    assert f"each output is the mean of {NUM_VIEWS[views]} views ({views})" in lines[0]
    images = run.dataset.train.images[:5]
    with torch.inference_mode():
        expected = average_views(reference.classifier, images, views)
    assert not torch.allclose(expected, torch.from_numpy(reference.logits[:5]), atol=0.01)
    for name in ("model.onnx", "model.pt", "model.pt2"):
        logits, probabilities = load_predictor(name, (version / name).read_bytes())(images.numpy())
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        np.testing.assert_allclose(probabilities, expected.softmax(dim=1), atol=1e-4)
    manifest = json.loads((version / "manifest.json").read_text())
    assert (manifest["metrics"]["test_time_views"], manifest["metrics"]["num_views"]) == (views, NUM_VIEWS[views])
    assert manifest["metrics"]["run"]["test_time_views"] == "one"
    assert manifest["metrics"]["run"]["views"] == views
    assert manifest["metrics"]["run"]["test_errors_with_views"] == 120
    chosen = reference.parity_images
    with torch.inference_mode():
        predicted = average_views(reference.classifier, next(chosen.batches(150, 150)), views).argmax(dim=1)
    assert manifest["metrics"]["val_errors"] == int((predicted.numpy() != chosen.labels[:150]).sum())
    golden = np.load(version / "golden.npz")
    with torch.inference_mode():
        expected = average_views(reference.classifier, torch.from_numpy(golden["images"]), views)
    np.testing.assert_allclose(golden["logits"], expected, atol=1e-5)


@pytest.mark.usefixtures("converted")
def test_the_log_says_that_a_recipe_has_no_views_to_export(run: Run, model: RepositoryModel) -> None:
    lines: list[str] = []
    version = export(
        replace(run, progress=RecordingProgress(lines)),
        model,
        None,
        replace(OPTIONS, export_views=True, thorough=True),
    )
    assert lines[0].endswith("; recipe mnist has no test-time views to export")
    # `thorough` compares all parity images at every batch size.
    parity = json.loads((version / "manifest.json").read_text())["parity"]
    assert parity["plan"]["name"] == "thorough"
    assert (parity["num_validation_images"], parity["num_training_images"]) == (150, 1350)  # the whole data set
    assert [result["num_images"] for result in parity["formats"]["model.onnx"]] == [1500] * 5


@pytest.mark.usefixtures("converted")
def test_a_gpu_computes_the_accuracy_and_the_cpu_does_if_the_memory_of_the_gpu_is_full(
    run: Run, model: RepositoryModel, reference: ReferenceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Needs no GPU: the test replaces the function that computes on one."""
    on_gpu = replace(OPTIONS, device=torch.device("cuda"))
    asked: list[torch.device] = []

    def logits_on_gpu(self: ReferenceModel, device: torch.device) -> FloatArray | None:
        asked.append(device)
        return (
            None if len(asked) > 1 else reference_logits(self.classifier, self.parity_images.batches(256, 1000)) * 0 - 1
        )

    monkeypatch.setattr(ReferenceModel, "logits_on_gpu", logits_on_gpu)
    with pytest.raises(QualityError, match="assigns every image to the class '0'"):
        export(run, model, None, on_gpu)
    metrics = json.loads((export(run, model, None, on_gpu) / "manifest.json").read_text())["metrics"]
    assert metrics["val_errors"] == count_errors(reference)
    assert asked == [torch.device("cuda")] * 2


def test_logits_on_a_full_gpu_are_none(reference: ReferenceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    cpu = torch.device("cpu")
    logits = reference.logits_on_gpu(cpu)
    assert logits is not None
    np.testing.assert_allclose(logits, reference.logits, atol=1e-5)
    monkeypatch.setattr("trainer.export.reference.reference_logits", fail)
    assert reference.logits_on_gpu(cpu) is None
