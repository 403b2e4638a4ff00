"""The command `convoy models`: shows and chooses which version of each model serves, of a server or in a folder."""

import json
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro
from google.protobuf.json_format import MessageToDict

from convoy.options import option
from convoy.printable import printable
from convoy.processes import restore_ctrl_c
from convoy.verbs import Verb, run_verb
from protos.models_pb2 import ModelState
from serving.client.cli import EXIT_INVALID, EXIT_NO_RESPONSE, ConnectConfig, parse, report
from serving.client.client import Client
from serving.client.display import show_table
from serving.client.errors import ClientError
from serving.errors import InvalidArgument, NotFound, ServingError, StartupError, Unavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class WhereConfig:
    """Where the models are."""

    model_repository: Annotated[str | None, option("PATH", "asks the server")] = None
    """Folder or address of a model repository to work in, without a server. A server in poll mode follows."""
    model_cache: Annotated[Path | None, option("PATH", "~/.cache/convoy/repositories")] = None
    """Folder for the copies of repositories at an address."""
    json: bool = False
    """Print one line of JSON for each model in place of a table."""
    connect: Annotated[ConnectConfig, tyro.conf.arg(name="connect"), tyro.conf.OmitArgPrefixes] = field(
        default_factory=ConnectConfig
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedConfig:
    """A model, and where it is."""

    name: Annotated[str, tyro.conf.Positional, option("NAME")]
    """Name of the model."""
    where: Annotated[WhereConfig, tyro.conf.arg(name="")] = field(default_factory=WhereConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionConfig:
    """A version of a model, and where it is."""

    name: Annotated[str, tyro.conf.Positional, option("NAME")]
    """Name of the model."""
    version: Annotated[int, tyro.conf.Positional, option("VERSION")]
    """Number of the version."""
    where: Annotated[WhereConfig, tyro.conf.arg(name="")] = field(default_factory=WhereConfig)


VERBS: dict[str, tuple[type[Any], str]] = {
    "list": (WhereConfig, "list the models, and which version of each serves"),
    "show": (NamedConfig, "show the versions of a model"),
    "promote": (VersionConfig, "let a version serve until a newer one is exported"),
    "rollback": (NamedConfig, "let the version serve that served before, until a newer one is exported"),
    "pin": (VersionConfig, "let a version serve, whatever is exported, until it is unpinned"),
    "unpin": (NamedConfig, "let versions take over again that are newer than the pinned one"),
}

PROG = "convoy models"

_LOOK_S = 1.0
"""Between two looks at what the server does while it makes a change."""
_PATIENCE_S = 86_400.0
"""For a change. The server limits the time of each load itself."""

EXIT_CODES = (
    "Exit codes: 0 success; 2 the command line is wrong, or there is no such model or version; 3 the server does not "
    "respond, the version does not load, or the folder cannot be written; 130 Ctrl-C, after which a change goes on."
)


def main(arguments: Sequence[str]) -> NoReturn:
    """Runs the verb and ends the process."""

    def runner(verb: str, config: type[Any], summary: str) -> Callable[[Sequence[str]], int]:
        description = f"{summary[0].upper()}{summary[1:]}.\n\n{EXIT_CODES}"
        return lambda rest: _run(verb, parse(config, rest, f"{PROG} {verb}", description))

    verbs = {name: Verb(summary, runner(name, config, summary)) for name, (config, summary) in VERBS.items()}
    try:
        sys.exit(run_verb(PROG, verbs, arguments))
    except ClientError as error:
        sys.exit(report(error))
    except (ServingError, StartupError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(EXIT_INVALID if isinstance(error, InvalidArgument | NotFound) else EXIT_NO_RESPONSE)


def _run(verb: str, config: Any) -> int:
    where: WhereConfig = config if verb == "list" else config.where
    name, version = getattr(config, "name", ""), getattr(config, "version", 0)
    if verb != "list" and not name:  # which means all models elsewhere
        raise InvalidArgument("the name of the model is empty")
    work = _with_server if where.model_repository is None else _in_folder
    states = work(where, verb, name, version)
    if where.json:
        for state in states:
            print(json.dumps(MessageToDict(state, preserving_proto_field_name=True)), flush=True)
    elif verb == "list":
        header = ("model", "serves", "versions", "choice", "rollback to", "reason")
        show_table(header, [_row(state) for state in states])
    else:
        _show(states[0])
    return 0


def _with_server(where: WhereConfig, verb: str, name: str, version: int) -> list[ModelState]:
    with where.connect.client() as client:
        match verb:
            case "list" | "show":
                return client.models(name)
            case "promote":
                change = partial(client.promote, name, version)
            case "pin":
                change = partial(client.pin, name, version)
            case "unpin":
                change = partial(client.unpin, name)
            case _:
                change = partial(client.roll_back, name)
        return [_wait_for(change, client, name)]


def _wait_for(change: Callable[..., ModelState], client: Client, name: str) -> ModelState:
    """Makes a change, however long a version takes to load, as long as the server answers what it does meanwhile."""
    restore_ctrl_c()
    changing = ThreadPoolExecutor(1).submit(change, timeout_s=_PATIENCE_S)
    loading, said = list[str](), ""
    try:
        while not wait([changing], _LOOK_S).done:
            state = client.models(name)[0]
            loading = [str(version.version) for version in state.versions if version.state == "LOADING"]
            doing = f"load version {', '.join(loading)} of {name}" if loading else f"change {name}"
            if loading and state.serving:
                doing += f"; version {state.serving} serves until then"
            if doing != said:
                print(f"waiting for the server to {doing}", file=sys.stderr)
            said = doing
        return changing.result()
    except KeyboardInterrupt:
        goes_on = f"loading version {', '.join(loading)}" if loading else "with the change if it has begun"
        print(f"no longer waiting: the server goes on {goes_on}; convoy models show {name} shows it", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        client.close()  # ends the thread


def _in_folder(where: WhereConfig, verb: str, name: str, version: int) -> list[ModelState]:
    from serving.models.folder import RepositoryFolder
    from serving.models.mirror import open_location
    from serving.models.offline import find_model, list_models

    assert where.model_repository is not None
    path, mirror = open_location(where.model_repository, where.model_cache)
    folder = RepositoryFolder(path, lambda: None, mirror)
    if problem := folder.fetch(name, version):
        raise Unavailable(problem)
    if verb == "list":
        return list_models(path)
    model = find_model(path, name)
    if verb != "show":
        model.change(verb, version, folder.write_promotion)
        model = find_model(path, name)
    return [model.state()]


def _row(state: ModelState) -> tuple[str, ...]:
    versions = ", ".join(str(version.version) for version in state.versions)
    return (state.name, str(state.serving or "-"), versions, state.choice, str(state.before or "-"), _reason(state))


def _reason(state: ModelState) -> str:
    """Returns why the model cannot be read, or else why the newest version does not serve, if none does."""
    reason: str = state.reason
    if not reason and not state.serving and state.versions:
        reason = state.versions[-1].reason
    return reason


def _show(state: ModelState) -> None:
    serves = f"serves version {state.serving}" if state.serving else "serves no version"
    if not state.versions and state.reason:
        serves += f": {state.reason}"
    choice = f"; {state.choice}, {state.time}" if state.choice else ""
    back = f"; rollback goes to version {state.before}" if state.before else ""
    print(f"{state.name} {serves}{choice}{back}")
    rows = [(str(version.version), version.state or "-", version.reason) for version in reversed(state.versions)]
    show_table(("version", "state", "reason"), rows)
