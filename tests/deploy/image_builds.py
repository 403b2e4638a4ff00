"""Builds the images with buildah, without a container engine, and runs their programs as a pod would."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.deploy.manifests import DEPLOY, ROOT

SCRIPTS = DEPLOY / "docker"
BASE = "localhost/python-debian:3.11"
CERTIFICATES = ("/etc/ssl/certs", "/usr/local/share/ca-certificates")
"""This machine's, for builds behind a proxy that has its own certificates."""

RUN = """
root=$1; shift
mount --bind "$root" "$root"
for file in hosts resolv.conf; do touch "$root/etc/$file"; mount --bind "/etc/$file" "$root/etc/$file"; done
mount -o remount,bind,ro "$root"
mount -t tmpfs tmpfs "$root/tmp"
for system in dev proc; do mount --rbind "/$system" "$root/$system"; done
while [ "$1" != -- ]; do mount --bind "$1" "$root$2"; shift 2; done
shift
exec chroot --userspec=10001:10001 --groups=10001 "$root" "$@"
"""
"""Shell script that runs a command on a read-only root as uid 10001, with this machine's network and names. Arguments:
ROOT [FOLDER PLACE]... -- COMMAND..."""


def install() -> None:
    """Installs buildah and mmdebstrap, if they are not there."""
    if shutil.which("buildah") and shutil.which("mmdebstrap"):
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    packages = ["apt-get", "install", "-y", "--no-install-recommends", "buildah", "mmdebstrap"]
    for command in (["apt-get", "update"], packages):
        subprocess.run(command, check=True, capture_output=True, env=environment, timeout=300)


def torch_for_cpus() -> Path | None:
    """Returns torch's wheel for CPUs, if pip is configured (PIP_FIND_LINKS) to find one on this machine."""
    folders = [Path(word) for word in os.environ.get("PIP_FIND_LINKS", "").split()]
    return next((wheel for folder in folders for wheel in folder.glob("torch-*+cpu-cp311-*_x86_64.whl")), None)


@dataclass(frozen=True)
class Image:
    """A built image: its digest, its configuration, and the root folder of a container.

    Args:
        digest: of the manifest, which covers layers and configuration.
    """

    digest: str
    root: Path
    config: dict[str, Any]

    @property
    def megabytes(self) -> float:
        """The size of all files, each counted once."""
        files = {(status.st_dev, status.st_ino): status.st_size for status in self._statuses()}
        return sum(files.values()) / 1e6

    def _statuses(self) -> Iterator[os.stat_result]:
        for folder, _, names in os.walk(self.root):
            for name in names:
                yield os.lstat(Path(folder) / name)

    def start(
        self, command: Sequence[str], folders: Mapping[str, Path], log: Path, variables: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Starts a command as uid 10001 on the read-only root.

        Args:
            command: the program and its arguments; the image's entry point if the first is "".
            folders: the volumes, by the places where the program sees them.
            log: the file for standard output and error.
            variables: further environment variables.
        """
        if not command[0]:
            command = [*self.config["Entrypoint"], *command[1:]]
        values = {**dict(pair.split("=", 1) for pair in self.config["Env"]), **(variables or {})}
        volumes = [word for place, folder in folders.items() for word in (str(folder), place)]
        for place in folders:
            (self.root / place.lstrip("/")).mkdir(exist_ok=True)
        pairs = [f"{key}={value}" for key, value in values.items()]
        inside = ["env", "-i", f"--chdir={self.config['WorkingDir']}", *pairs, *command]
        words = ["unshare", "--mount", "sh", "-euc", RUN, "sh", str(self.root), *volumes, "--", *inside]
        with log.open("wb") as output:
            return subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)

    def output(self, *command: str) -> str:
        """Returns what a command prints.

        Raises:
            AssertionError: it fails.
        """
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            code = self.start(command, {}, log).wait(120)
            assert code == 0, log.read_text()
            return log.read_text()


class Builder:
    """Builds images in a store of its own.

    Args:
        folder: for the store.
    """

    def __init__(self, folder: Path) -> None:
        config = folder / "storage.conf"
        config.write_text(f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/images"\nrunroot = "{folder}/run"\n')
        volumes = [f"--volume={place}:{place}:ro" for place in CERTIFICATES if Path(place).is_dir()]
        self._options = ["--pull-never", "--quiet", *volumes]
        self._environment = {
            **os.environ,
            "CONTAINERS_STORAGE_CONF": str(config),
            "BUILDAH_ISOLATION": "chroot",
            "ENGINE": "buildah",
            "BASE": BASE,
            "SOURCE_DATE_EPOCH": "1700000000",
        }

    def make_base(self) -> None:
        """Makes the base image from Debian's packages."""
        self._run("sh", str(SCRIPTS / "base.sh"), BASE)

    def build(self, image: str, tag: str = "", *options: str) -> str:
        """Builds an image by `images.sh`. Returns its name."""
        more = {"BUILD_OPTIONS": " ".join([*self._options, *options]), "TAG": tag}
        printed = self._run("sh", str(SCRIPTS / "images.sh"), image, **more)
        named = re.search(r"^building (\S+)$", printed, flags=re.MULTILINE)
        assert named is not None, printed
        return named[1]

    @contextlib.contextmanager
    def container(self, name: str) -> Iterator[Image]:
        """Context with a container of an image."""
        container = self._run("buildah", "from", "--pull-never", name).strip()
        try:
            root = Path(self._run("buildah", "mount", container).strip())
            config = json.loads(self._run("buildah", "inspect", "--type=image", name))["OCIv1"]["config"]
            # Two names of one image are two lines.
            (digest,) = set(self._run("buildah", "images", "--format={{.Digest}}", name).split())
            yield Image(digest, root, config)
        finally:
            self._run("buildah", "rm", container)

    def close(self) -> None:
        """Deletes all containers and images."""
        self._run("buildah", "rm", "--all")
        self._run("buildah", "rmi", "--all", "--force")

    def _run(self, *command: str, **variables: str) -> str:
        environment = {**self._environment, **{key: value for key, value in variables.items() if value}}
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=1200, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        return done.stdout
