"""Checks of the images that build none: lint, sources, entry points, locks. `test_image_builds.py` builds two."""

import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from convoy.cli import OUR_PACKAGES
from tests.deploy.locks import locked
from tests.deploy.manifests import DEPLOY, ROOT, find, render

DOCKER = DEPLOY / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
VARIANTS = ("cpu", "gpu")
LOCKS = ["serving-remote", *(f"{image}-{variant}" for image in ("serving", "trainer") for variant in VARIANTS)]
CUDA = ("nvidia-", "cuda-", "triton")
BASE = "docker.io/library/python:3.11-slim-bookworm"


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
        for variant in VARIANTS
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
    steps = instructions(path, "cpu")
    assert steps[0] == ("ARG", f"BASE={BASE}")
    last = steps[max(i for i, (word, _) in enumerate(steps) if word == "FROM") :]
    assert last[0] == ("FROM", "${BASE}")
    assert ("USER", "10001:10001") in last
    assert [rest for word, rest in last if word == "COPY"] == ["--from=build /opt/convoy /opt/convoy"]
    installs = [rest for word, rest in last if word in ("RUN", "ADD")]
    assert len(installs) == (path.name == "trainer.Dockerfile")
    assert all(rest.startswith('if [ "cpu" = gpu ]; then') for rest in installs)


def test_the_trainers_image_for_gpus_has_what_triton_compiles_with() -> None:
    """Triton compiles a launcher in C++ for each kernel, against Python's headers, when the first step runs."""
    [install] = [rest for word, rest in instructions(DOCKER / "trainer.Dockerfile", "gpu") if "apt-get" in rest]
    assert re.search(r"apt-get install .* g\+\+ libc6-dev \$\{headers\}", install)


def test_entry_points_are_the_manifests_commands() -> None:
    objects = render("pipeline")
    for name, dockerfile in (("Deployment/serving", "serving"), ("Job/trainer", "trainer")):
        entry = dict(instructions(DOCKER / f"{dockerfile}.Dockerfile"))["ENTRYPOINT"]
        container = find(objects, name)["spec"]["template"]["spec"]["containers"][0]
        assert yaml.safe_load(entry) == container["command"]
        pod = find(objects, name)["spec"]["template"]["spec"]["securityContext"]
        assert pod["runAsUser"] == 10001


@pytest.mark.parametrize("name", LOCKS)
def test_images_have_the_tested_versions(name: str) -> None:
    tested, image = locked(ROOT / "requirements.lock"), locked(DOCKER / f"{name}.lock")
    assert image
    if not name.endswith("-gpu"):
        twins = {version.rpartition(".")[0] for version in tested["onnxruntime-gpu"] | tested["onnxruntime"]}
        assert {version.rpartition(".")[0] for version in image.pop("onnxruntime")} == twins
    assert {package for package, versions in image.items() if not versions <= tested.get(package, set())} == set()


@pytest.mark.parametrize("name", LOCKS)
def test_only_images_for_gpus_have_cuda(name: str) -> None:
    packages = locked(DOCKER / f"{name}.lock")
    assert any(package.startswith(CUDA) for package in packages) is name.endswith("-gpu")
    assert ("onnxruntime-gpu" in packages) is name.endswith("-gpu")
    assert not {"pytest", "tritonclient"} & set(packages)
    assert ("torch" in packages) is (name == "trainer-gpu")
    assert ("onnx" in packages) is name.startswith("trainer")


def test_torch_for_cpus_has_the_locked_versions() -> None:
    text = (DOCKER / "trainer.Dockerfile").read_text()
    wheels = dict(re.findall(r"(torch|torchvision)==([\d.]+)\+cpu", text))
    assert {name: {version} for name, version in wheels.items()} == {
        name: locked(DOCKER / "trainer-gpu.lock")[name] for name in ("torch", "torchvision")
    }


@pytest.mark.parametrize("name", LOCKS)
def test_locks_are_for_x86_and_arm(name: str) -> None:
    """ONNX Runtime has its CUDA build for x86-64 alone, and another package serves ARM."""
    text = (DOCKER / f"{name}.lock").read_text()
    arm = r"^onnxruntime==[\d.]+ ; \(platform_machine != 'AMD64' and platform_machine != 'x86_64'\)"
    x86 = r"^onnxruntime(-gpu)?==[\d.]+ ; .*platform_machine == 'x86_64' and sys_platform == 'linux'"
    for pattern in (arm, x86):
        assert re.search(pattern, text, flags=re.MULTILINE), pattern


@pytest.mark.parametrize("name", ["images", "base", "finish", "lock"])
def test_scripts_are_shell_without_errors(name: str) -> None:
    done = subprocess.run(["sh", "-n", DOCKER / f"{name}.sh"], capture_output=True, text=True, timeout=10, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unknown_image_is_refused_in_one_line() -> None:
    done = subprocess.run(
        ["sh", DOCKER / "images.sh", "server"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={"PATH": "/usr/bin:/bin", "ENGINE": "buildah"},
    )
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: no image 'server'; there are serving, serving-remote, serving-gpu, trainer and trainer-gpu\n"
    )
