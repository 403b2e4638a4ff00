"""A run of the GPU: its evaluation, its export, and what a server on the GPU answers with it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import text_format

from protos.model_config_pb2 import ModelConfig, ModelInstanceGroup
from serving.backends import pt2, torchscript
from serving.models.spec import to_spec
from serving.protocol.tensors import Array
from tests.e2e.gpu_ranks import ON_A_GPU, PLAIN, Command, trained
from tests.e2e.test_training import result_of
from tests.serving.server_process import ServerProcess
from trainer.cli import evaluate_command

pytestmark = [pytest.mark.gpu, *ON_A_GPU]

GPU: int | None = 0
BACKENDS = {"torchscript": torchscript, "pt2": pt2}
FILES = {"torchscript": "model.pt", "pt2": "model.pt2"}


@pytest.fixture(scope="module")
def run(one_gpu: None, tmp_path_factory: pytest.TempPathFactory, gpu_command: Command) -> Path:
    """A run folder, beside the model repository `models`."""
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("exported")
    printed = trained(
        gpu_command(*PLAIN, "--run-dir", str(folder / "run"), "--export", "--model-repository", str(folder / "models"))
    )
    assert "exported to " in printed
    return folder / "run"


@pytest.fixture(scope="module")
def models(run: Path) -> Path:
    """A repository with the exported model once for each backend of torch, on the GPU."""
    (exported,) = (run.parent / "models").iterdir()
    repository = run.parent / "served"
    for name, file in FILES.items():
        shutil.copytree(exported, repository / name)
        config = text_format.Parse((exported / "config.pbtxt").read_text(), ModelConfig())
        config.name, config.backend, config.platform, config.default_model_filename = name, name, "", file
        config.instance_group.add(kind=ModelInstanceGroup.KIND_CPU if GPU is None else ModelInstanceGroup.KIND_GPU)
        (repository / name / "config.pbtxt").write_text(text_format.MessageToString(config))
    return repository


@pytest.fixture(scope="module")
def golden(models: Path) -> dict[str, Array]:
    with np.load(models / "pt2" / "1" / "golden.npz") as arrays:
        return dict(arrays)


def test_evaluation_gives_the_figures_of_the_training(
    run: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = "cpu" if GPU is None else "cuda"
    with pytest.raises(SystemExit) as left:
        evaluate_command([str(run), "--data-dir", str(data_dir), "--device", device], "convoy evaluate")
    assert left.value.code == 0
    assert f"validation accuracy {100 * result_of(run)['val_accuracy']:.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_gives_the_golden_outputs(name: str, models: Path, golden: dict[str, Array]) -> None:
    """TorchScript was off by 0.001 to 0.003 when it was exported with TF32 allowed, or when the process allowed it."""
    spec = to_spec(text_format.Parse((models / name / "config.pbtxt").read_text(), ModelConfig()))
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    instance = BACKENDS[name].load(models / name / "1" / FILES[name], spec, GPU, 1)
    logits, _ = instance.run([golden["images"]])
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)


def test_a_server_on_the_gpu_answers(models: Path, golden: dict[str, Array], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a vendor's container, whose environment allows TF32."""
    try:
        from serving.client import Client
        from serving.frontends.grpcio import GrpcioFrontend  # noqa: F401 (what the server imports)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs the packages of the server, and grpcio no older than grpcio-reflection: {error}")
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    server = ServerProcess("--model-repository", str(models), "--allow-model-code", "--transport", "grpcio")
    try:
        with Client(server.target()) as client:
            for name in BACKENDS:
                answer = client.infer(name, {"images": golden["images"]})
                np.testing.assert_allclose(answer["logits"], golden["logits"], atol=1e-4)
        assert server.stop() == 0
    finally:
        server.close()
        print("".join(server.lines))
