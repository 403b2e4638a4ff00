"""Builds images for real and runs them: the server's, with and without an object store, and the trainer's for CPUs.

Builds neither image for GPUs, which take 4 to 9 GB of downloads: `make images` does. The base is made from Debian's
packages by `base.sh`, not pulled; chroot isolation tests neither cgroups nor seccomp.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import wait_for
from tests.deploy.image_builds import SCRIPTS, Builder, Image, install, torch_for_cpus
from tests.deploy.locks import locked
from tests.serving.model_files import SCALE_CONFIG, scale, write_config, write_version
from tests.serving.server_process import READY

pytestmark = pytest.mark.installs

MAX_MB = {"serving": 350, "serving-remote": 420, "trainer": 1500}
SERVES = "import serving.server, serving.frontends.native, serving.frontends.grpcio, serving.backends.onnx, sys"
PROVIDERS = "import onnxruntime; print(onnxruntime.get_available_providers())"
WRITES = """
import os
try:
    open("/opt/convoy/x", "w")
except OSError as error:
    print(os.getuid(), error.errno)
"""
"""Prints the user and why it cannot write (30: the file system is read-only)."""


@pytest.fixture(scope="module")
def builder() -> Iterator[Builder]:
    install()
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which pytest keeps for a while
        builder = Builder(Path(folder))
        builder.make_base()
        yield builder
        builder.close()


@pytest.fixture(scope="module", autouse=True)
def trainer_build(builder: Builder) -> Iterator[Future[str] | None]:
    """Builds the trainer's image beside the other tests. None if this machine has no wheel of torch for CPUs."""
    wheel = torch_for_cpus()
    if wheel is None:
        yield None
        return
    options = (f"--volume={wheel.parent}:/wheels:ro", f"--build-arg=TORCH_CPU=/wheels/{wheel.name}")
    with ThreadPoolExecutor(1) as other:
        yield other.submit(builder.build, "trainer", "", *options)


@pytest.fixture(scope="module")
def serving(builder: Builder) -> Iterator[Image]:
    with builder.container(builder.build("serving")) as image:
        yield image


def test_the_servers_image_is_small_labelled_and_lists_its_packages(serving: Image) -> None:
    assert serving.megabytes <= MAX_MB["serving"]
    labels = serving.config["Labels"]
    assert labels["org.opencontainers.image.title"] == "convoy-serving"
    assert f'version = "{labels["org.opencontainers.image.version"]}"' in Path("pyproject.toml").read_text()
    assert len(labels["org.opencontainers.image.revision"]) == 40
    assert listed(serving) == {name for name in locked(SCRIPTS / "serving-cpu.lock") if name != "setuptools"}


def test_the_servers_image_has_neither_pip_nor_torch_nor_cuda(serving: Image) -> None:
    packages = next((serving.root / "opt/convoy/lib").glob("python3*/site-packages"))
    assert (packages / "onnxruntime").is_dir()
    assert not [name for name in ("pip", "setuptools", "torch", "nvidia") if (packages / name).exists()]
    assert not list(packages.rglob("tests"))
    assert "CUDA" not in serving.output("python", "-c", PROVIDERS)
    assert serving.output("python", "-c", f"{SERVES}; print('torch' in sys.modules)") == "False\n"
    assert "--model" in serving.output("python", "-m", "convoy", "classify", "--help")


def test_the_server_answers_as_uid_10001_on_a_read_only_root(serving: Image, tmp_path: Path) -> None:
    assert serving.config["User"] == "10001:10001"
    write = (
        "import os; print(os.getuid())\ntry: open('/opt/convoy/x', 'w')\nexcept OSError as error: print(error.errno)"
    )
    assert serving.output("python", "-c", write) == "10001\n30\n"

    models, log = tmp_path / "models", tmp_path / "log"
    write_config(models / "scale", SCALE_CONFIG)
    write_version(models / "scale", 1, scale(3.0))
    let_others_in(tmp_path)
    with running(serving, ["--model-repository=/models"], {"/models": models}, log) as ask:
        assert ask() == [3, 6, 9]


@pytest.mark.filterwarnings("default")
def test_the_servers_image_follows_an_object_store(builder: Builder, tmp_path: Path) -> None:
    import boto3
    from moto.server import ThreadedMotoServer

    store = ThreadedMotoServer("127.0.0.1", 0)
    store.start()
    address = "http://{}:{}".format(*store.get_host_and_port())
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    model, copy, log = tmp_path / "scale", tmp_path / "copy", tmp_path / "log"
    write_config(model, SCALE_CONFIG)
    write_version(model, 1, scale(3.0), manifest={})
    copy.mkdir()
    copy.chmod(0o777)
    let_others_in(tmp_path)
    try:
        client = boto3.client(
            "s3", endpoint_url=address, aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1"
        )
        client.create_bucket(Bucket="bucket")
        upload(client, model)
        arguments = ["--model-repository=s3://bucket/models", "--model-cache=/models", "--model-control-mode=poll"]
        variables = {**keys, "AWS_ENDPOINT_URL_S3": address}
        with builder.container(builder.build("serving-remote")) as image:
            assert image.megabytes <= MAX_MB["serving-remote"]
            with running(image, [*arguments, "--poll-interval-s=0.5"], {"/models": copy}, log, variables) as ask:
                assert ask() == [3, 6, 9]
                write_version(model, 2, scale(4.0), manifest={})
                upload(client, model)
                wait_for("version 2", lambda: ask() == [4, 8, 12])
        client.close()
    finally:
        store.stop()


def test_two_builds_are_equal(builder: Builder, serving: Image) -> None:
    with builder.container(builder.build("serving", "again")) as again:
        assert again.digest == serving.digest


def test_every_package_of_the_server_has_a_wheel_for_arm(tmp_path: Path) -> None:
    uv = [str(Path(sys.executable).parent / "uv"), "pip", "install", "--dry-run", "--no-deps", "--only-binary=:all:"]
    target = [f"--target={tmp_path}", "--python-platform=aarch64-manylinux_2_28", "--python-version=3.11"]
    done = subprocess.run(
        [*uv, *target, "--require-hashes", f"--requirements={SCRIPTS / 'serving-cpu.lock'}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert " + onnxruntime==" in done.stderr


def test_the_trainers_image_trains_without_cuda(
    builder: Builder, trainer_build: Future[str] | None, tmp_path: Path
) -> None:
    """Takes torch's wheel from this machine, which may be older than the lock's, and no torchvision."""
    if trainer_build is None:
        pytest.skip("PIP_FIND_LINKS names no folder with torch's wheel for CPUs. The trainer's image is NOT tested")
    with builder.container(trainer_build.result()) as image:
        assert image.megabytes <= MAX_MB["trainer"]
        assert image.config["User"] == "10001:10001"
        expected = set(locked(SCRIPTS / "trainer-cpu.lock"))
        assert listed(image) == expected | {"torch"}
        folders = {"/training": tmp_path / "training", "/models": tmp_path / "models"}
        for folder in folders.values():
            folder.mkdir()
            folder.chmod(0o777)
        let_others_in(tmp_path)
        arguments = ["--recipe=mnist", "--dataset=mnist-mini", "--device=cpu", "--epochs=1", "--run-dir=/training/run"]
        log = tmp_path / "log"
        process = image.start(["", *arguments, "--model-repository=/models"], folders, log, {"PET_STANDALONE": "1"})
        try:
            assert process.wait(600) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()
        assert (tmp_path / "models/mnist/1/model.onnx").exists(), log.read_text()


def upload(client: Any, model: Path) -> None:
    """Puts the files of a model into the bucket's folder `models`."""
    for file in (path for path in model.rglob("*") if path.is_file()):
        client.upload_file(str(file), "bucket", f"models/{file.relative_to(model.parent)}")


@contextlib.contextmanager
def running(
    image: Image,
    arguments: Sequence[str],
    folders: Mapping[str, Path],
    log: Path,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Callable[[], Any]]:
    """Context with a server of an image, started by its entry point, and what asks its model for three numbers."""
    ports = [f"--{name}-port=0" for name in ("grpc", "http", "metrics")]
    process = image.start(["", *arguments, *ports], folders, log, variables)
    try:
        wait_for("a ready server", lambda: bool(READY.search(log.read_text())), lambda: process.poll() is not None)
        ready = READY.search(log.read_text())
        assert ready is not None
        url = f"http://127.0.0.1:{ready[3]}/v2/models/scale/infer"
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}
        yield lambda: httpx.post(url, json={"inputs": [tensor]}, timeout=60).json()["outputs"][0]["data"]
        process.terminate()
        assert process.wait(60) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def let_others_in(folder: Path) -> None:
    """Lets another user than pytest's reach a folder."""
    for each in (folder, *folder.parents[:2]):
        each.chmod(0o755)


def listed(image: Image) -> set[str]:
    """Returns the names of the packages that an image lists, without our own."""
    listing = json.loads((image.root / "opt/convoy/sbom.cdx.json").read_text())
    assert (listing["bomFormat"], listing["metadata"]["component"]["name"]) == ("CycloneDX", "convoy-vision")
    return {component["name"].lower().replace("_", "-").replace(".", "-") for component in listing["components"]}
