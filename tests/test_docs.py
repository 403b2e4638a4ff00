"""Links and commands in the documentation lead to something that exists."""

import re
import subprocess
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from convoy.cli import VERBS, completion_script
from tests.conftest import ROOT
from trainer.service.settings import ServiceConfig

PATTERNS = ("*.md", "docs/**/*.md", "deploy/**/*.md", "benchmarks/**/*.md")
PAGES = sorted(page for pattern in PATTERNS for page in ROOT.glob(pattern))
OPTION = re.compile(r"--[a-z][a-z0-9-]*[a-z0-9]")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_have_verbs_that_exist(page: Path) -> None:
    verbs = re.findall(r"^\$ convoy ([a-z]+)|`convoy ([a-z]+)", page.read_text(), flags=re.MULTILINE)
    assert {first or second for first, second in verbs} <= set(VERBS)


OPTIONS_OF_OTHERS = {
    "kubectl": "--for --from-file --prefix --previous --timeout --docker-password --docker-server --docker-username",
    "builders of images": "--all --build-arg --manifest --output --platform --push --volume",
    "torchrun and Slurm": "--max-restarts --nnodes --ntasks-per-node --rdzv --rdzv-backend --signal",
    "curl, mypy, TensorBoard": "--data-binary --strict --logdir",
    "benchmarks": "--peer --peers --rounds --triton",
    "convoy itself": "--completion",
}


def test_options_exist() -> None:
    known = {f"--{field.name.replace('_', '-')}" for field in fields(ServiceConfig)}
    known.update(OPTION.findall(completion_script("bash") + " ".join(OPTIONS_OF_OTHERS.values())))
    folders = (ROOT, ROOT / "docs", ROOT / "deploy", ROOT / "deploy/docker")  # decisions and results tell of their time
    pages = [page for page in PAGES if page.parent in folders and page.name != "CHANGELOG.md"]
    named = {(page.name, option) for page in pages for option in OPTION.findall(page.read_text())}
    assert sorted((page, option) for page, option in named if option not in known) == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 920


def test_the_changelog_and_the_citation_have_this_version() -> None:
    assert f"## [{VERSION}] - " in (ROOT / "CHANGELOG.md").read_text()
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == VERSION


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (targets,) = re.findall(r"^\.PHONY: help (.+)$", makefile, flags=re.MULTILINE)
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(re.findall(r"^make (\S+)", done.stdout, flags=re.MULTILINE)) == set(targets.split())


@pytest.mark.parametrize("page", [page for page in PAGES if "results" not in page.parts], ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    named = re.findall(
        r"(?:[`(]|\.\./)((?:convoy|trainer|serving|protos|deploy|tests|benchmarks|examples|docs)/[\w./-]+)`",
        page.read_text(),
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


NO_MODULES = {"convoy.backends", "convoy.engines", "convoy.models.ModelControl"}
"""Entry point groups, and a gRPC service."""


def names_something(dotted: str) -> bool:
    """Returns whether `trainer.x.y` is a module, a package, or a name that occurs in one."""
    path, *names = ROOT, *dotted.split(".")
    while names and (path / names[0]).is_dir():
        path /= names.pop(0)
    if names and (path / names[0]).with_suffix(".py").exists():
        path = (path / names.pop(0)).with_suffix(".py")
    source = path if path.is_file() else path / "__init__.py"
    return path != ROOT and (not names or re.search(rf"\b{names[0]}\b", source.read_text()) is not None)


def test_modules_named_in_text_exist() -> None:
    packages = ("convoy", "protos", "serving", "trainer")
    texts = [*PAGES, *(source for package in packages for source in (ROOT / package).rglob("*.py"))]
    pattern = re.compile(rf"`((?:{'|'.join(packages)})(?:\.[A-Za-z_]\w*)+)(?<!\.json)`")
    named = {name for text in texts if "results" not in text.parts for name in pattern.findall(text.read_text())}
    assert [name for name in sorted(named - NO_MODULES) if not names_something(name)] == []
    assert not names_something("trainer.no_such_module")
