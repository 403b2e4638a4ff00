"""Checks of the images that need no container engine: lint, sources, entry points, contents.

The base image's digest is a build argument, and a build without one fails at once.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from convoy.cli import OUR_PACKAGES
from tests.deploy.manifests import DEPLOY, ROOT, find, render

DOCKER = DEPLOY / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
VARIANTS = {"serving.Dockerfile": ("cpu", "gpu"), "trainer.Dockerfile": ("",)}

MEASURED_MB = {("serving", "cpu"): 225, ("serving", "gpu"): 2607, ("trainer", ""): 6278}
"""Size of the virtual environment in each image, as deploy/README.md states it."""

IMPORTS = "import serving.server, serving.frontends.native, serving.frontends.grpcio, serving.backends.onnx, sys"
HAS_CUDA = "import onnxruntime; print('CUDAExecutionProvider' in onnxruntime.get_available_providers())"
SERVES = (
    (["-m", "serving", "--help"], "--model-repository"),
    (["-c", f"{IMPORTS}; print('torch' in sys.modules)"], "False"),
    (["-m", "convoy", "classify", "--help"], "--model"),
)
PROBES = {
    ("serving", "cpu"): (*SERVES, (["-c", HAS_CUDA], "False")),
    ("serving", "gpu"): (*SERVES, (["-c", HAS_CUDA], "True")),
    ("trainer", ""): (
        (["-m", "trainer.launch", "--help"], "--nnodes"),
        (["-m", "trainer.main", "--help"], "--recipe"),
        (["-m", "convoy", "evaluate", "--help"], "--split"),
        (
            ["-c", "import torch, trainer.export, trainer.report.page; print(torch.distributed.is_nccl_available())"],
            "True",
        ),
    ),
}
"""Arguments for the image's Python, and the output that they must give."""


def instructions(path: Path, variant: str = "") -> list[tuple[str, str]]:
    """Returns pairs such as `("COPY", "a b")`, with joined lines and the variant filled in."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [(word, rest.replace("${VARIANT}", variant)) for word, _, rest in (line.partition(" ") for line in lines)]


def is_sent(path: str) -> bool:
    """Returns whether .dockerignore lets a path in: the last pattern that matches it or a parent decides."""
    sent = True
    parts = Path(path).parts
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        bare = pattern.removeprefix("!")
        above = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
        if any(_matches(bare, one) for one in above):
            sent = pattern.startswith("!")
    return sent


def _matches(pattern: str, path: str) -> bool:
    if pattern.startswith("**/"):
        return any(fnmatch(part, pattern[3:]) for part in Path(path).parts)
    return len(Path(pattern).parts) == len(Path(path).parts) and fnmatch(path, pattern)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "hadolint", path], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_copied_paths_exist_and_are_sent(path: Path) -> None:
    copied = [
        source
        for variant in VARIANTS[path.name]
        for word, rest in instructions(path, variant)
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert is_sent(source), f".dockerignore keeps {source} out"


def test_only_the_images_contents_are_sent() -> None:
    assert is_sent("convoy/cli.py")
    assert is_sent("serving/server.py")
    assert is_sent("deploy/docker/trainer.lock")
    for path in ("tests/conftest.py", ".git/config", "runs/a", "models/mnist/1/model.onnx", ".venv/bin/python"):
        assert not is_sent(path), path
    assert not is_sent("serving/__pycache__/server.pyc")
    assert not is_sent("deploy/overlays/dev/kustomization.yaml")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_every_package_of_ours_that_is_imported_is_copied(path: Path) -> None:
    copied = {rest.split()[0] for word, rest in instructions(path) if word == "COPY"} & set(OUR_PACKAGES)
    imported = {
        name
        for package in copied
        for file in (ROOT / package).rglob("*.py")
        if file != ROOT / "convoy/cli.py"  # imports a verb's package when it runs
        for name in re.findall(r"^ *(?:from|import) (\w+)", file.read_text(), flags=re.MULTILINE)
    }
    assert imported & set(OUR_PACKAGES) == copied


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_final_stage_is_a_plain_base_with_a_numeric_user(path: Path) -> None:
    steps = instructions(path)
    last = steps[max(i for i, (word, _) in enumerate(steps) if word == "FROM") :]
    assert last[0] == ("FROM", "${BASE}")
    assert ("USER", "10001:10001") in last
    assert not [rest for word, rest in last if word in ("RUN", "ADD")]
    assert [rest for word, rest in last if word == "COPY"] == ["--from=build /opt/convoy /opt/convoy"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_base_without_a_digest_is_refused(path: Path) -> None:
    check = next(rest for word, rest in instructions(path) if word == "RUN")
    for base, expected in (("python:3.11", 1), ("python@sha256:abc", 1), (f"python:3.11@sha256:{'0' * 64}", 0)):
        done = subprocess.run(["sh", "-c", check], env={"BASE": base}, capture_output=True, timeout=10, check=False)
        assert done.returncode == expected, base


def test_entry_points_are_the_manifests_commands() -> None:
    objects = render("pipeline")
    for name, dockerfile in (("Deployment/serving", "serving"), ("Job/trainer", "trainer")):
        entry = dict(instructions(DOCKER / f"{dockerfile}.Dockerfile"))["ENTRYPOINT"]
        container = find(objects, name)["spec"]["template"]["spec"]["containers"][0]
        assert yaml.safe_load(entry) == container["command"]
        pod = find(objects, name)["spec"]["template"]["spec"]["securityContext"]
        assert pod["runAsUser"] == 10001


def locked(path: Path) -> dict[str, set[str]]:
    """Returns the versions of each package; several where they depend on Python's version or the platform."""
    versions: dict[str, set[str]] = {}
    for package, version in re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==([\w.+]+)", path.read_text(), flags=re.MULTILINE):
        versions.setdefault(package, set()).add(version)
    return versions


@pytest.mark.parametrize("name", ["serving-cpu", "serving-gpu", "trainer"])
def test_images_have_the_tested_versions(name: str) -> None:
    tested, image = locked(ROOT / "requirements.lock"), locked(DOCKER / f"{name}.lock")
    assert image
    if name == "serving-cpu":
        (version,), (twin,) = image.pop("onnxruntime"), tested["onnxruntime-gpu"]
        assert version.split(".")[:2] == twin.split(".")[:2]
    assert {package for package, versions in image.items() if not versions <= tested.get(package, set())} == set()


@pytest.mark.parametrize("name", ["serving-cpu", "serving-gpu"])
def test_serving_images_have_no_torch(name: str) -> None:
    packages = locked(DOCKER / f"{name}.lock")
    assert not {"torch", "torchvision", "onnx", "pytest", "tritonclient"} & set(packages)
    assert any(package.startswith("nvidia") for package in packages) is (name == "serving-gpu")


@pytest.mark.installs
@pytest.mark.parametrize(("dockerfile", "variant"), MEASURED_MB)
def test_the_build_stage_builds_a_working_environment(dockerfile: str, variant: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:  # not tmp_path, which pytest keeps for a while
        python = build_stage(instructions(DOCKER / f"{dockerfile}.Dockerfile", variant), Path(scratch))
        for words, expected in PROBES[dockerfile, variant]:
            done = subprocess.run([python, *words], cwd=scratch, capture_output=True, text=True, check=True)
            assert expected in done.stdout
        subprocess.run([python, "-c", "import importlib.util as u; assert not u.find_spec('pip')"], check=True)
        files = [path for path in python.parent.parent.rglob("*") if path.is_file() and not path.is_symlink()]
        size_mb = sum(file.stat().st_size for file in files) / 1e6
    assert size_mb == pytest.approx(MEASURED_MB[dockerfile, variant], rel=0.1)


def build_stage(steps: list[tuple[str, str]], folder: Path) -> Path:
    """Runs each COPY and RUN of the build stage, with /opt/convoy and /build in a folder, and returns its Python."""
    build, environment = folder / "build", folder / "convoy"
    build.mkdir()
    passed = {key: value for key, value in os.environ.items() if key.upper().startswith(("PIP_", "HTTP", "SSL"))}
    variables = {"PATH": os.environ["PATH"], "HOME": str(folder), "BASE": f"python@sha256:{'0' * 64}"} | passed
    for word, rest in steps[: max(i for i, (word, _) in enumerate(steps) if word == "FROM")]:
        if word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, build / target)
        elif word == "RUN":
            command = rest.replace("/opt/convoy", str(environment)).replace("RUN ", "")
            subprocess.run(["sh", "-c", command], cwd=build, env=variables, check=True, timeout=3600)
    return environment / "bin/python"
