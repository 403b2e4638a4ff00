"""The command `convoy`, as a user runs it."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from convoy import cli
from convoy.extras import how_to_install
from convoy.verbs import Verb
from tests.conftest import ROOT, clean_environment
from trainer.__main__ import SUMMARIES

CONVOY = [sys.executable, "-m", "convoy"]
HEAVY = ("torch", "grpc", "numpy", "tyro", "starlette")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*CONVOY, *arguments]
    return subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["trian"]])
def test_what_runs_no_verb_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom convoy.cli import run\n"
        f"run({arguments})\nprint([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_the_console_script_is_this_command() -> None:
    script = Path(sys.executable).parent / "convoy"
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == run("--version").stdout == "convoy 0.2.0\n"


def test_help_lists_every_verb() -> None:
    done = run("--help")
    assert done.returncode == 0
    for name, verb in cli.VERBS.items():
        assert f"  {name:9s} {verb.summary}\n" in done.stdout


def test_verbs_have_the_trainers_summaries() -> None:
    shared = {name: verb.summary for name, verb in cli.VERBS.items() if name in SUMMARIES and name != "train"}
    assert shared == {name: summary for name, summary in SUMMARIES.items() if name != "train"}


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "usage: convoy VERB [OPTIONS]"),
        (["trian"], 2, "error: no verb 'trian': did you mean train?"),
        (["recipes"], 0, "mnist-fast"),
        (["recipes", "mnist", "cifar10"], 2, "error: convoy recipes takes the name of one recipe"),
        (["recipes", "--help"], 0, "usage: convoy recipes [RECIPE]"),
        (["data", "--help"], 0, "usage: convoy data VERB [OPTIONS]"),
        (["train", "--help"], 0, "PATH-OR-RECIPE"),
        (["train", "mnits"], 2, "error: no such folder, and no recipe 'mnits': did you mean mnist"),
        (["evaluate", "--help"], 0, "usage: convoy evaluate"),
        (["data", "list", "--help"], 0, "usage: convoy data list"),
        (["study", "sedes"], 2, "error: no study 'sedes': did you mean seeds?"),
        (["study", "seeds", "--help"], 0, "usage: convoy study seeds"),
        (["serve", "--help"], 0, "usage: convoy serve"),
        (["serve", "--model-repository", "nowhere"], 2, "error: "),
        (["classify", "--help"], 0, "usage: convoy classify"),
        (["status", "--target", "127.0.0.1:1"], 3, "error: "),
    ],
)
def test_every_verb_is_reached(
    arguments: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.observability.logging.set_up_logging", lambda log_format: None)  # of this process
    try:
        returned = cli.run(arguments)
    except SystemExit as left:
        returned = left.code
    printed = capsys.readouterr()
    assert returned == code
    assert text in printed.out + printed.err


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def needs(name: str) -> Verb:
        def run(arguments: object) -> int:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        return Verb("", run)

    monkeypatch.setitem(cli.VERBS, "serve", needs("onnxruntime.capi"))
    assert cli.run(["serve"]) == 2
    assert capsys.readouterr().err == f"error: convoy serve needs onnxruntime: {how_to_install('serving')}\n"
    monkeypatch.setitem(cli.VERBS, "train", needs("trainer"))
    assert cli.run(["train"]) == 2
    assert capsys.readouterr().err == f"error: convoy train needs trainer: {how_to_install('trainer')}\n"
    monkeypatch.setitem(cli.VERBS, "train", needs("trainer.no_such_module"))
    with pytest.raises(ModuleNotFoundError):
        cli.run(["train"])


def test_a_closed_pipe_ends_it_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*CONVOY, "--help"], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "convoy.bash"
    path.write_text(cli.completion_script("bash"))
    return path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["convoy", "tr"], {"train"}),
        (["convoy", "st"], {"study", "status"}),
        (["convoy", "study", "se"], {"seeds"}),
        (["convoy", "data", "im"], {"import"}),
        (["convoy", "train", "--virtual"], {"--virtual-shards"}),
        (["convoy", "train", "--np"], {"--nproc"}),
        (["convoy", "evaluate", "--split", ""], {"validation", "test"}),
        (["convoy", "serve", "--grpc-s"], {"--grpc-socket"}),
        (["convoy", "classify", "--inv"], {"--invert"}),
    ],
)
def test_bash_completes_verbs_options_and_choices(words: list[str], expected: set[str], bash_script: Path) -> None:
    quoted = " ".join(f"'{word}'" for word in words)
    state = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}"
    code = f"source {bash_script}; {state}; _tyro_convoy; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected


@pytest.mark.parametrize(("shell", "start"), [("zsh", "#compdef convoy"), ("fish", "#")])
def test_other_shells_have_scripts(shell: str, start: str) -> None:
    assert cli.completion_script(shell).startswith(start)


def test_an_unknown_shell_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--completion", "ksh"]) == 2
    assert capsys.readouterr().err == "error: convoy --completion takes one of bash, zsh, fish\n"


def commands() -> list[list[str]]:
    from serving.models_command import VERBS as MODELS_VERBS
    from trainer.data.commands import COMMANDS as DATA_COMMANDS
    from trainer.service.commands import COMMANDS as JOBS_COMMANDS
    from trainer.studies import STUDIES

    pages = {"study": STUDIES, "jobs": JOBS_COMMANDS, "models": MODELS_VERBS, "data": DATA_COMMANDS}
    inner = [[verb, name] for verb, names in pages.items() for name in names]
    return [*([verb] for verb in cli.VERBS if verb not in pages), *inner]


def test_help_says_what_a_command_does_and_shows_defaults_in_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's None, () and types mean nothing to a user, and what a command does is not what its options are."""
    monkeypatch.setenv("COLUMNS", "1000")
    firsts = {}
    for command in commands():
        with contextlib.suppress(SystemExit):
            cli.run([*command, "--help"])
        shown = capsys.readouterr().out
        firsts[" ".join(command)] = shown.splitlines()[2]
        assert not re.search(r"None|\(default: \)|default: [^)]*\] \(default|--[a-z-]+ STR", shown), command
        # tyro keeps the line breaks of docstrings, which are in the wrong places then
        assert not re.search(r"(\n│ {8,}\w.*){2}", shown), command
    assert len(set(firsts.values())) == len(firsts), firsts
