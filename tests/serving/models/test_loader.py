"""A version's folder becomes a model that answers, or one line that says why not."""

import re
import shutil
import threading
import warnings

import numpy as np
import pytest
import torch

from serving.errors import LoadError
from serving.inference.batcher import Job
from serving.models import devices
from serving.models.config import read_config
from serving.models.devices import CudaUnusable
from serving.models.loader import LoadSettings, load_version
from tests.serving.model_files import (
    SCALE_CONFIG,
    add_without_batch,
    classifier,
    scale,
    sum_and_difference,
    write_config,
    write_version,
)

PREFERRED = SCALE_CONFIG + "dynamic_batching { preferred_batch_size: [ 1, 2 ] }"


class OneRow(Job):
    """A request whose answer a test waits for."""

    def __init__(self, *arrays):
        super().__init__(tuple(array.tobytes() for array in arrays), tuple(a.shape for a in arrays), 1, None)
        self.answered = threading.Event()

    def finish(self, outputs, first_row):
        self.outputs = [outputs.slice(index, first_row, 1).tolist() for index in range(len(outputs.arrays))]
        self.answered.set()

    def fail(self, error):
        self.outputs = error
        self.answered.set()


@pytest.fixture
def load(tmp_path):
    models = []

    def load_it(version=1, settings=LoadSettings(device="cpu", num_threads=1)):  # noqa: B008
        folder = tmp_path / "m"
        model = load_version(folder, version, read_config(folder), settings)
        models.append(model)
        return model

    yield load_it
    for model in models:
        model.batcher.close()


def ask(model, *arrays):
    job = OneRow(*arrays)
    model.batcher.submit(job)
    assert job.answered.wait(60)
    return job.outputs


def test_a_configured_model_answers(tmp_path, load):
    write_config(tmp_path / "m", SCALE_CONFIG)
    write_version(tmp_path / "m", 1, scale(3))
    model = load()
    assert ask(model, np.array([[1, 2, 3]], np.float32)) == [[[3, 6, 9]]]
    assert (model.version, model.spec.name, model.spec.max_batch_size) == ("1", "m", 4)
    assert model.load_s > 0
    assert model.statistics.snapshot().execution_count == 1, "warming up does not count"


@pytest.mark.parametrize(
    ("config", "told"),
    [(SCALE_CONFIG, r"[124] rows \(measured"), (PREFERRED, r"2 rows \(preferred_batch_size")],
)
def test_what_a_batch_is_filled_up_to_is_measured_or_configured_and_told(tmp_path, load, caplog, config, told):
    caplog.set_level("INFO")
    write_config(tmp_path / "m", config)
    write_version(tmp_path / "m", 1, scale(3))
    load()
    assert re.search(rf"m version 1: batches are filled up to {told}\)", caplog.text)


def test_without_a_configuration_the_onnx_file_tells_all(tmp_path, load):
    write_version(tmp_path / "m", 1, sum_and_difference())
    model = load()
    assert [spec.name for spec in model.spec.inputs] == ["a", "b"]
    assert [spec.name for spec in model.spec.outputs] == ["sum", "difference", "copy"]
    assert model.spec.message.name == "m"
    assert ask(model, np.array([[5, 6]]), np.array([[1, 2]]))[:2] == [[[6, 8]], [[4, 4]]]


def test_a_model_without_batch_dimension_answers(tmp_path, load):
    write_version(tmp_path / "m", 1, add_without_batch())
    model = load()
    assert model.spec.max_batch_size == 0
    job = OneRow(np.ones((2, 3), np.float32))
    model.batcher.submit(job)
    assert job.answered.wait(60)


def test_a_torchscript_model_is_completed_from_its_manifest(tmp_path, load):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(3, 2))
        buffer = tmp_path / "saved"
        module.save(buffer)
    tensors = [[{"name": name, "datatype": "FP32", "shape": [-1, 2]}] for name in "xy"]
    manifest = {"inputs": tensors[0], "outputs": tensors[1]}
    x = np.array([[1, 2], [3, 4]], np.float32)
    golden = {"x": x, "y": module(torch.from_numpy(x)).detach().numpy()}
    write_version(tmp_path / "m", 1, buffer.read_bytes(), filename="model.pt", manifest=manifest, golden=golden)
    model = load()
    assert (model.spec.backend, model.spec.platform) == ("pytorch", "pytorch_libtorch")
    np.testing.assert_allclose(ask(model, x[:1])[0], golden["y"][:1], rtol=1e-5)


def test_a_torchscript_model_alone_does_not_tell_its_tensors(tmp_path, load):
    write_version(tmp_path / "m", 1, b"", filename="model.pt")
    with pytest.raises(LoadError, match=r"list input and output in config\.pbtxt"):
        load()


def test_labels_belong_to_outputs(tmp_path, load):
    label = 'label_filename: "labels.txt" }'
    write_config(
        tmp_path / "m",
        SCALE_CONFIG.replace(
            'name: "y" data_type: TYPE_FP32 dims: [ 3 ] }', f'name: "y" data_type: TYPE_FP32 dims: [ 3 ] {label}'
        ),
    )
    write_version(tmp_path / "m", 1, scale(3))
    with pytest.raises(LoadError, match=r"the labels in labels\.txt cannot be read"):
        load()
    (tmp_path / "m/labels.txt").write_text("zéro\none\ntwo\n", encoding="utf-8")
    assert load().labels == {"y": ["zéro", "one", "two"]}


IMAGES = np.arange(20, dtype=np.uint8).reshape(5, 1, 2, 2)


def golden_of(content):
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return {"images": IMAGES, "logits": session.run(["logits"], {"images": IMAGES})[0]}


def test_a_golden_batch_that_is_answered_right_passes(tmp_path, load):
    write_version(tmp_path / "m", 1, classifier(1), golden=golden_of(classifier(1)), manifest={})
    load()


def test_the_golden_batch_finds_another_model_s_weights(tmp_path, load):
    write_version(tmp_path / "m", 1, classifier(2), golden=golden_of(classifier(1)), manifest={})
    with pytest.raises(LoadError, match="the golden batch is answered wrong: 'logits' differs by"):
        load()


def test_the_manifest_s_tolerance_counts(tmp_path, load):
    write_version(tmp_path / "m", 1, classifier(2), golden=golden_of(classifier(1)), manifest={"golden_tolerance": 100})
    load()


def test_a_damaged_file_is_never_opened(tmp_path, load):
    folder = write_version(tmp_path / "m", 1, classifier(), manifest={})
    (folder / "model.onnx").write_bytes(classifier()[:-1])
    with pytest.raises(LoadError, match=r"model\.onnx is damaged"):
        load()


def test_instances_are_as_many_as_configured_and_share_the_threads(tmp_path, load, caplog):
    caplog.set_level("INFO")
    write_config(tmp_path / "m", SCALE_CONFIG + "instance_group { count: 2 kind: KIND_CPU }")
    write_version(tmp_path / "m", 1, scale(3))
    before = threading.active_count()
    load(settings=LoadSettings(num_threads=5))
    assert threading.active_count() == before + 2
    assert "m version 1 on CPU: CPUs 5, instances 2, threads of each 2" in caplog.text


def test_a_version_that_fails_leaves_no_thread(tmp_path, load):
    write_config(tmp_path / "m", SCALE_CONFIG)
    write_version(tmp_path / "m", 1, scale(3), golden={"x": np.ones((1, 3), np.float32), "y": np.ones((1, 3))})
    before = threading.active_count()
    with pytest.raises(LoadError, match="answered wrong"):
        load()
    assert threading.active_count() == before


@pytest.mark.skipif(devices.count_gpus() > 0, reason="is about a machine on which CUDA does not work")
def test_a_gpu_that_cannot_be_used_is_done_without_unless_it_was_asked_for(tmp_path, load, caplog, monkeypatch):
    monkeypatch.setattr(devices, "count_gpus", lambda: 1)
    write_config(tmp_path / "m", SCALE_CONFIG)
    write_version(tmp_path / "m", 1, scale(3))
    model = load(settings=LoadSettings(device="auto", num_threads=1))
    assert ask(model, np.ones((1, 3), np.float32)) == [[[3, 3, 3]]]
    assert "m runs on the CPU: ONNX Runtime cannot use CUDA: " in caplog.text
    with pytest.raises(CudaUnusable):
        load(settings=LoadSettings(device="cuda", num_threads=1))
    write_config(tmp_path / "m", SCALE_CONFIG + "instance_group { kind: KIND_GPU }")
    with pytest.raises(CudaUnusable):
        load(settings=LoadSettings(device="auto", num_threads=1))


def test_a_version_without_a_model_says_so(tmp_path, load):
    folder = write_version(tmp_path / "m", 1, b"")
    (folder / "model.onnx").unlink()
    with pytest.raises(LoadError, match=r"there is no model\.onnx nor model\.pt in version 1"):
        load()
    shutil.rmtree(folder)
