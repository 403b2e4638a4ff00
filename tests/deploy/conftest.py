"""Fixtures: promtool, and a training run that several tests share."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.deploy.training import Trained, train_through_losses


@pytest.fixture(scope="session")
def promtool() -> Path:
    """Returns the path of promtool: from PATH, or extracted from Debian's package into the user's cache."""
    return _from_debian("promtool")


@pytest.fixture(scope="session")
def prometheus() -> Path:
    """Returns the path of Prometheus, found as promtool is."""
    return _from_debian("prometheus")


def _from_debian(program: str) -> Path:
    found = shutil.which(program)
    if found is not None:
        return Path(found)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convoy" / program
    if not cache.exists():
        problem = _extract_from_debian(cache)
        if problem:
            pytest.skip(f"no {program}: not on PATH, and {problem}. Alert rules and queries are NOT tested")
    return cache


def _extract_from_debian(target: Path) -> str:
    """Extracts the program of that name to `target`, and returns the reason if that fails, or ""."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        return "there is no apt to fetch Debian's package `prometheus` with"
    with tempfile.TemporaryDirectory() as scratch:
        done = _apt_get("download", "prometheus", folder=scratch)
        if done.returncode != 0:  # a fresh machine has no package lists: fetch them, but not into the system
            own_lists = ("-o", f"Dir::State::lists={scratch}/lists", "-o", f"Dir::Cache={scratch}/cache")
            _apt_get(*own_lists, "update", folder=scratch)
            done = _apt_get(*own_lists, "download", "prometheus", folder=scratch)
        packages = list(Path(scratch).glob("prometheus_*.deb"))
        if done.returncode != 0 or not packages:
            return f"`apt-get download prometheus` fails: {done.stderr.strip()[-200:]}"
        subprocess.run(["dpkg", "-x", packages[0], "x"], cwd=scratch, check=True, timeout=120)
        target.parent.mkdir(parents=True, exist_ok=True)
        arriving = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.copy2(Path(scratch) / "x/usr/bin" / target.name, arriving)
        arriving.rename(target)
    return ""


def _apt_get(*words: str, folder: str) -> subprocess.CompletedProcess[str]:
    command = ["apt-get", "-o", "APT::Sandbox::User=root", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180, check=False)


@pytest.fixture(scope="session")
def trained(has_namespaces: bool, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Runs the pipeline's Job on two hosts, with an eviction and a kill, up to the published model."""
    return train_through_losses(tmp_path_factory.mktemp("pipeline"), namespaces=has_namespaces)
