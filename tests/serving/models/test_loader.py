"""Loading a version returns a model that answers, or raises one line that says why not."""

import re
import shutil
import threading
import warnings

import numpy as np
import pytest
import torch

from serving.errors import LoadError
from serving.inference.rate_limiter import RateLimiter
from serving.models import devices
from serving.models.config import read_config
from serving.models.devices import CudaUnavailable
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
from tests.serving.models.one_row import infer

PREFERRED = SCALE_CONFIG + "dynamic_batching { preferred_batch_size: [ 1, 2 ] }"


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


def test_a_configured_model_answers(tmp_path, load):
    write_config(tmp_path / "m", SCALE_CONFIG)
    write_version(tmp_path / "m", 1, scale(3))
    model = load()
    assert infer(model, np.array([[1, 2, 3]], np.float32)) == [[[3, 6, 9]]]
    assert (model.version, model.spec.name, model.spec.max_batch_size) == ("1", "m", 4)
    assert model.load_s > 0
    model.batcher.close()  # statistics are written just after the answer
    assert model.statistics.snapshot().execution_count == 1, "warm-up does not count"


@pytest.mark.parametrize(
    ("config", "logged"),
    [(SCALE_CONFIG, r"[124] \(measured"), (PREFERRED, r"2 \(preferred_batch_size")],
)
def test_the_target_batch_size_is_measured_or_configured_and_logged(tmp_path, load, caplog, config, logged):
    caplog.set_level("INFO")
    write_config(tmp_path / "m", config)
    write_version(tmp_path / "m", 1, scale(3))
    load()
    assert re.search(rf"m version 1: target batch size {logged}\)", caplog.text)


def test_the_samples_of_the_configuration_run_before_the_version_serves(tmp_path, load):
    """The model has open sizes, so that nothing else could be made up."""
    sample = 'model_warmup { name: "%s" inputs { key: "x" value { data_type: TYPE_FP32 dims: 2 %s: %s } } }'
    tensors = 'input { name: "x" data_type: TYPE_FP32 dims: -1 } output { name: "y" data_type: TYPE_FP32 dims: -1 }'
    write_config(tmp_path / "m", f'backend: "python" max_batch_size: 4 {tensors}' + sample % ("w", "zero_data", "true"))
    (tmp_path / "m" / "1").mkdir()
    code = "import pathlib\n\n\ndef run(batch):\n    with pathlib.Path(%r).open('a') as log:\n"
    code += "        log.write(f\"{batch['x'].tolist()}\\n\")\n    return {'y': batch['x']}\n"
    (tmp_path / "m" / "1" / "model.py").write_text(code % str(tmp_path / "log"))
    load(settings=LoadSettings(device="cpu", num_threads=1, allow_model_code=True))
    runs = (tmp_path / "log").read_text().splitlines()
    assert set(runs) == {str([[0.0, 0.0]] * rows) for rows in (1, 2, 4)}
    assert runs[-1] == "[[0.0, 0.0]]"
    write_config(tmp_path / "m", SCALE_CONFIG + sample % ("wrong", "zero_data", "true"))
    write_version(tmp_path / "m", 2, scale(1))
    with pytest.raises(LoadError, match=r"model_warmup 'wrong': input 'x' is TYPE_FP32 of dims \[3\], got .* \[2\]"):
        load(2)


def test_instances_that_need_more_than_there_is_are_not_loaded(tmp_path, load, caplog):
    group = "instance_group { count: 2 rate_limiter { resources { name: 'memory' count: 3 } } }"
    write_config(tmp_path / "m", SCALE_CONFIG + group)
    write_version(tmp_path / "m", 1, scale(3))
    limiter = RateLimiter({("memory", ""): 2})
    with pytest.raises(LoadError, match="needs 3 of the resource 'memory', but the server has 2"):
        load(settings=LoadSettings(device="cpu", num_threads=1, limiter=limiter))
    model = load(settings=LoadSettings(device="cpu", num_threads=1, limiter=RateLimiter()))
    assert infer(model, np.array([[1, 2, 3]], np.float32)) == [[[3, 6, 9]]]
    load()
    assert "m: 'rate_limiter' has no effect without --rate-limit execution_count" in caplog.text


def test_without_a_configuration_the_tensors_come_from_the_onnx_file(tmp_path, load):
    write_version(tmp_path / "m", 1, sum_and_difference())
    model = load()
    assert [spec.name for spec in model.spec.inputs] == ["a", "b"]
    assert [spec.name for spec in model.spec.outputs] == ["sum", "difference", "copy"]
    assert model.spec.config.name == "m"
    assert infer(model, np.array([[5, 6]]), np.array([[1, 2]]))[:2] == [[[6, 8]], [[4, 4]]]


def test_a_model_without_batch_dimension_answers(tmp_path, load):
    write_version(tmp_path / "m", 1, add_without_batch())
    model = load()
    assert model.spec.max_batch_size == 0
    (answer,) = infer(model, np.ones((2, 3), np.float32))
    assert answer == [[2, 2, 2]] * 2


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
    np.testing.assert_allclose(infer(model, x[:1])[0], golden["y"][:1], rtol=1e-5)


def test_a_torchscript_model_without_manifest_needs_configured_tensors(tmp_path, load):
    write_version(tmp_path / "m", 1, b"", filename="model.pt")
    with pytest.raises(LoadError, match=r"model\.pt does not describe its tensors: list them in config\.pbtxt"):
        load()


def test_labels_are_read_for_each_output(tmp_path, load):
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


def test_a_correct_model_passes_the_golden_check(tmp_path, load):
    write_version(tmp_path / "m", 1, classifier(1), golden=golden_of(classifier(1)), manifest={})
    load()


def test_the_golden_check_rejects_the_weights_of_another_model(tmp_path, load):
    write_version(tmp_path / "m", 1, classifier(2), golden=golden_of(classifier(1)), manifest={})
    with pytest.raises(LoadError, match="the model fails the golden check: 'logits' differs by"):
        load()


def test_the_manifest_sets_the_tolerance(tmp_path, load):
    write_version(tmp_path / "m", 1, classifier(2), golden=golden_of(classifier(1)), manifest={"golden_tolerance": 100})
    load()


def test_a_damaged_file_is_never_opened(tmp_path, load):
    folder = write_version(tmp_path / "m", 1, classifier(), manifest={})
    (folder / "model.onnx").write_bytes(classifier()[:-1])
    with pytest.raises(LoadError, match=r"model\.onnx is damaged"):
        load()


def test_the_instances_of_a_version_share_the_threads(tmp_path, load, caplog):
    caplog.set_level("INFO")
    write_config(tmp_path / "m", SCALE_CONFIG + "instance_group { count: 2 kind: KIND_CPU }")
    write_version(tmp_path / "m", 1, scale(3))
    before = set(threading.enumerate())
    load(settings=LoadSettings(num_threads=5))
    assert len(set(threading.enumerate()) - before) == 3, "two instances and their watchdog"
    assert "m version 1 on CPU: instances 2, CPU threads of each 2" in caplog.text


def test_each_version_may_use_all_threads(tmp_path, load):
    """As `--num-threads` says: versions loaded at the same time, as during a swap, do not share the threads."""
    write_config(tmp_path / "m", SCALE_CONFIG + "instance_group { kind: KIND_CPU }")
    threads = []
    for version in (1, 2):
        write_version(tmp_path / "m", version, scale(version))
        (backend,) = load(version, LoadSettings(num_threads=3)).batcher._backends
        threads.append(backend.opened._session.get_session_options().intra_op_num_threads)
    assert threads == [3, 3]


def test_a_version_that_fails_leaves_no_thread(tmp_path, load):
    write_config(tmp_path / "m", SCALE_CONFIG)
    write_version(tmp_path / "m", 1, scale(3), golden={"x": np.ones((1, 3), np.float32), "y": np.ones((1, 3))})
    before = threading.active_count()
    with pytest.raises(LoadError, match="fails the golden check"):
        load()
    assert threading.active_count() <= before, "fewer, if one of an earlier test has ended meanwhile"


@pytest.mark.skipif(devices.count_gpus() > 0, reason="needs a machine without CUDA")
def test_an_unusable_gpu_falls_back_to_the_cpu_unless_a_gpu_is_required(tmp_path, load, caplog, monkeypatch):
    monkeypatch.setattr(devices, "count_gpus", lambda: 1)
    write_config(tmp_path / "m", SCALE_CONFIG)
    write_version(tmp_path / "m", 1, scale(3))
    model = load(settings=LoadSettings(device="auto", num_threads=1))
    assert infer(model, np.ones((1, 3), np.float32)) == [[[3, 3, 3]]]
    assert "m runs on the CPU: ONNX Runtime cannot use CUDA: " in caplog.text
    with pytest.raises(CudaUnavailable):
        load(settings=LoadSettings(device="cuda", num_threads=1))
    write_config(tmp_path / "m", SCALE_CONFIG + "instance_group { kind: KIND_GPU }")
    with pytest.raises(CudaUnavailable):
        load(settings=LoadSettings(device="auto", num_threads=1))


def test_a_version_without_a_model_says_so(tmp_path, load):
    folder = write_version(tmp_path / "m", 1, b"")
    (folder / "model.onnx").unlink()
    with pytest.raises(LoadError, match=r"there is no model\.onnx or model\.pt or .* in version 1"):
        load()
    shutil.rmtree(folder)
