"""The command `convoy`: the verbs of training and serving. Each imports its packages when it runs."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union

from convoy.extras import how_to_install
from convoy.verbs import Verb, run_verb
from convoy.version import convoy_version

SHELLS = ("bash", "zsh", "fish")
SERVING_VERBS = ("serve", "classify", "status", "models")
OUR_PACKAGES = ("convoy", "trainer", "serving", "protos")

MORE_HELP = f"""
convoy --version prints the version.
convoy --completion {"|".join(SHELLS)} prints a script that completes verbs and options in that shell."""


def run(arguments: Sequence[str]) -> int:
    """Runs a command line.

    Returns:
        The exit code. Most verbs end the process themselves.
    """
    match list(arguments):
        case ["--version"]:
            print(f"convoy {convoy_version()}")
            return 0
        case ["--completion", shell] if shell in SHELLS:
            print(completion_script(shell))
            return 0
        case ["--completion", *_]:
            print(f"error: convoy --completion takes one of {', '.join(SHELLS)}", file=sys.stderr)
            return 2
    try:
        return run_verb("convoy", VERBS, arguments, more_help=MORE_HELP)
    except ModuleNotFoundError as error:
        package, _, module = (error.name or "").partition(".")
        if module and package in OUR_PACKAGES:
            raise  # a defect of ours
        verb = arguments[0]
        extra = "serving" if verb in SERVING_VERBS else "trainer"
        print(f"error: convoy {verb} needs {package}: {how_to_install(extra)}", file=sys.stderr)
        return 2


def completion_script(shell: str) -> str:
    """Returns tyro's completion script for all verbs and their options."""
    import tyro

    with contextlib.redirect_stdout(io.StringIO()) as script, contextlib.suppress(SystemExit):
        tyro.cli(_options_of_all_verbs(), args=("--tyro-write-completion", shell, "-"), prog="convoy")
    # tyro's script for bash completes files only after an option; `-o default` also after a verb.
    return script.getvalue().replace("complete -F", "complete -o default -F")


def _options_of_all_verbs() -> Any:
    from serving.client.cli import ClassifyConfig, StatusConfig
    from serving.config import ServeConfig
    from serving.models_command import VERBS as MODELS_VERBS
    from trainer.config import CompareConfig, EvaluateConfig, ExportConfig
    from trainer.data.commands import COMMANDS as DATA_COMMANDS
    from trainer.local import LocalTrainConfig
    from trainer.service.commands import COMMANDS as JOBS_COMMANDS
    from trainer.studies import STUDIES, load_study
    from trainer.watch import WatchConfig

    studies = _subcommands({name: (load_study(name)[0], summary) for name, summary in STUDIES.items()})
    configs = {
        "train": LocalTrainConfig,
        "evaluate": EvaluateConfig,
        "export": ExportConfig,
        "watch": WatchConfig,
        "compare": CompareConfig,
        "study": studies,
        "recipes": _NoOptions,
        "jobs": _options_of(JOBS_COMMANDS),
        "data": _options_of(DATA_COMMANDS),
        "serve": ServeConfig,
        "classify": ClassifyConfig,
        "status": StatusConfig,
        "models": _subcommands(MODELS_VERBS),
    }
    return _subcommands({name: (configs[name], verb.summary) for name, verb in VERBS.items()})


def _options_of(commands: Mapping[str, tuple[type[Any], Any, str]]) -> Any:
    return _subcommands({name: (kind, summary) for name, (kind, _, summary) in commands.items()})


def _subcommands(configs: Mapping[str, tuple[Any, str]]) -> Any:
    """Returns the type that tyro reads as a choice of subcommands.

    Args:
        configs: the dataclass and the summary of each.
    """
    import tyro

    choices = (
        Annotated[config, tyro.conf.subcommand(name, description=summary)]
        for name, (config, summary) in configs.items()
    )
    return Union[tuple(choices)]  # noqa: UP007 (made at run time)


@dataclass(frozen=True)
class _NoOptions:
    pass


def _train(arguments: Sequence[str]) -> int | None:
    from trainer.local import local_train_command

    return local_train_command(arguments)


def _trainer(verb: str) -> Callable[[Sequence[str]], int | None]:
    def run(arguments: Sequence[str]) -> int | None:
        from trainer.cli import COMMANDS

        return COMMANDS[verb](arguments, f"convoy {verb}")

    return run


def _jobs(arguments: Sequence[str]) -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from trainer.service.commands import jobs_command

    return jobs_command(arguments)


def _serve(arguments: Sequence[str]) -> int:
    from serving.__main__ import main

    return main(arguments, prog="convoy serve")


def _client(verb: str) -> Callable[[Sequence[str]], int | None]:
    def run(arguments: Sequence[str]) -> int | None:
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # the client reports its errors itself, in one line
        from serving.client.cli import main

        return main([verb, *arguments], prog="convoy")

    return run


def _models(arguments: Sequence[str]) -> int | None:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from serving.models_command import main

    return main(arguments)


VERBS = {
    "train": Verb("train a model by a recipe, or on a folder of images", _train),
    "evaluate": Verb("measure a finished run's accuracy on its validation or test images", _trainer("evaluate")),
    "export": Verb("publish a finished run's model in a model repository", _trainer("export")),
    "watch": Verb("follow runs while they train, in the terminal or on a page", _trainer("watch")),
    "compare": Verb("show finished runs in one table, with all their seeds", _trainer("compare")),
    "study": Verb("repeat the lecture's experiments: regression, capacity, seeds, zoo and others", _trainer("study")),
    "recipes": Verb("list what can be trained, or all fields of a recipe", _trainer("recipes")),
    "jobs": Verb("submit trainings as jobs of this machine; list, follow, cancel and retry them", _jobs),
    "data": Verb("list, fetch, verify and import data sets", _trainer("data")),
    "serve": Verb("serve a model repository over gRPC and HTTP", _serve),
    "classify": Verb("classify images with a model of a server", _client("classify")),
    "status": Verb("show a server's models and their states", _client("status")),
    "models": Verb("choose which version of a model serves: promote, roll back, pin", _models),
}
