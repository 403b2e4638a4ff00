"""The client's command line: `classify` classifies image files, `status` shows the server and its models.

The help of each verb lists its exit codes.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import tyro

from convoy.images import EXTENSIONS
from convoy.named_files import read_file
from convoy.options import option, parse_options
from convoy.printable import printable
from convoy.token_lines import is_token
from convoy.verbs import Verb, run_verb
from serving.client.client import DEFAULT_TARGET, DEFAULT_TIMEOUT_S, Client
from serving.client.connection import Tls, is_loopback, parse_target
from serving.client.display import Row, json_line, show_table
from serving.client.errors import ClientError, invalid_argument
from serving.client.images import NO_FILES, ImageFile, PreparedImage
from serving.client.results import Classification

Config = TypeVar("Config")
Result = TypeVar("Result")
Prepared = PreparedImage | ImageFile

EXIT_BAD_IMAGE = 1
EXIT_INVALID = 2
EXIT_NO_RESPONSE = 3
_BATCH_FILES = 256
"""Files that are decoded before they are sent. It bounds the memory that a large folder takes."""
_NUM_DECODERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectConfig:
    """How to reach the server."""

    target: Annotated[str, tyro.conf.arg(metavar="ADDRESS")] = DEFAULT_TARGET
    """HOST:PORT or unix:/PATH."""
    timeout_s: float = DEFAULT_TIMEOUT_S
    """Seconds until a call fails, retries included."""
    token_file: Annotated[Path | None, option("PATH", "no token")] = None
    """File with the bearer token to send."""
    tls: bool = False
    """Use TLS. Each of the next three options implies it."""
    tls_ca: Annotated[Path | None, option("PATH", "the authorities that gRPC trusts")] = None
    """Certificates of the authorities that sign server certificates, PEM."""
    tls_cert: Annotated[Path | None, option("PATH", "no client certificate")] = None
    """Certificate chain of this client, PEM, for servers that require one."""
    tls_key: Annotated[Path | None, option("PATH", "no client certificate")] = None
    """Private key of the certificate, PEM."""

    def client(self) -> Client:
        """Returns a client with these settings; it connects with its first call.

        Raises:
            ClientError: a file cannot be read, or a value is invalid.
        """
        tls = Tls(ca=self.tls_ca, certificate=self.tls_cert, key=self.tls_key)
        uses_tls = self.tls or tls != Tls()
        if not self.timeout_s > 0:
            raise invalid_argument(f"--timeout-s {self.timeout_s:g}: must be positive")
        token = self._token()
        if token is not None and not uses_tls and not is_loopback(parse_target(self.target)):
            print(f"warning: the token travels to {self.target} in plain text; --tls encrypts it", file=sys.stderr)
        return Client(self.target, timeout_s=self.timeout_s, token=token, tls=tls if uses_tls else None)

    def _token(self) -> str | None:
        if self.token_file is None:
            return None
        try:
            token = read_file(self.token_file).decode("utf-8-sig").strip()
        except OSError as error:
            raise invalid_argument(f"cannot read a token from {self.token_file}: {error.strerror}") from error
        except UnicodeDecodeError:
            token = ""
        if not is_token(token):
            raise invalid_argument(f"token file {self.token_file} must hold one token in ASCII and nothing else")
        return token


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyConfig:
    """Classifies image files. Each image is resized and converted to grey or RGB as the model needs it.

    Exit codes: 0 success; 1 an image could not be read, all others are classified; 2 the command line or the model's
    name is wrong; 3 the server does not respond, or fails; 130 Ctrl-C; 141 the output was closed.
    """

    images: Annotated[tuple[Path, ...], tyro.conf.Positional, option("IMAGE...")]
    """Image files, and folders of image files."""
    model: Annotated[str, option("NAME")]
    """Name of the model."""
    version: Annotated[str, option("NUMBER", "the newest")] = ""
    """Version of the model."""
    top_k: int = 3
    """Number of classes to show for each image, most probable first."""
    invert: bool = False
    """Invert the images: for dark digits on white paper, if the model was trained on light digits on black."""
    send_files: bool = False
    """Send the files as they are, and let the server decode and prepare them: JPEG, PNG or WebP."""
    json: bool = False
    """Print one line of JSON for each image in place of a table."""
    connect: Annotated[ConnectConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=ConnectConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusConfig:
    """Shows whether the server is ready, and the state of each model version.

    Exit codes: 0 success; 2 the command line is wrong; 3 the server does not respond, or fails; 130 Ctrl-C; 141 the
    output was closed.
    """

    connect: Annotated[ConnectConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=ConnectConfig)


def main(arguments: Sequence[str], *, prog: str = "python -m serving.client") -> NoReturn:
    """Runs the verb and ends the process."""
    verbs = {
        "classify": Verb(
            "classify images with a model of a server",
            lambda rest: classify(parse(ClassifyConfig, rest, f"{prog} classify")),
        ),
        "status": Verb(
            "show a server's models and their states", lambda rest: status(parse(StatusConfig, rest, f"{prog} status"))
        ),
    }
    try:
        sys.exit(run_verb(prog, verbs, arguments))
    except ClientError as error:
        sys.exit(report(error))


def classify(config: ClassifyConfig) -> int:
    """Runs the verb `classify`. Returns the exit code."""
    if not config.images:
        raise invalid_argument("no images given")
    if config.top_k < 1:
        raise invalid_argument(f"--top-k {config.top_k}: must be at least 1")
    if config.invert and config.send_files:
        raise invalid_argument("--invert and --send-files exclude each other: the server inverts no files")
    rows = list[Row]()
    try:
        return _classify_all(config, rows)
    finally:  # what has been classified, if the server fails
        show_table(("file", "label", "probability"), rows)


def _classify_all(config: ClassifyConfig, rows: list[Row]) -> int:
    """Prints each image's classes as JSON, or adds them to the rows. Returns the exit code."""
    exit_code = 0
    with config.connect.client() as client:
        image_input = client.image_input(config.model, config.version)
        if config.send_files and not image_input.takes_files:
            raise invalid_argument(f"--send-files: {NO_FILES}")
        prepare = ImageFile.read if config.send_files else partial(image_input.prepare, invert=config.invert)
        ask = partial(client.classify, config.model, top_k=config.top_k, version=config.version)
        for batch in _batched(_files(config.images)):
            images: list[Prepared] = _without_errors(_prepare(batch, prepare))
            results = _without_errors(_classify_files(ask, images)) if config.send_files else ask(images)
            if len(results) < len(batch):
                exit_code = EXIT_BAD_IMAGE
            if config.json:
                for line in map(json_line, results):
                    print(line, flush=True)
            else:
                rows += _rows(results)
    return exit_code


def status(config: StatusConfig) -> int:
    """Runs the verb `status`. Returns the exit code."""
    with config.connect.client() as client:
        server, is_ready, models = client.server_metadata(), client.is_ready(), client.index()
    print(f"{server.name} {server.version} at {config.connect.target}: {'ready' if is_ready else 'not ready'}")
    rows = [(model.name, model.version, model.state, model.reason) for model in models]
    show_table(("model", "version", "state", "reason"), rows)
    return 0


def parse(kind: type[Config], arguments: Sequence[str], prog: str, description: str | None = None) -> Config:
    """Returns the options of a command line; ends the process if it is wrong.

    Args:
        description: what the help says first, if not the docstring of `kind`.
    """
    pairs_off = (tyro.conf.FlagCreatePairsOff,)
    options: Config = parse_options(kind, arguments, prog=prog, description=description, config=pairs_off)
    return options


def report(error: ClientError) -> int:
    """Prints an error in one line, and returns the command's exit code."""
    hint = "the server asks for a valid token, see --token-file: " if error.code == "UNAUTHENTICATED" else ""
    print(f"error: {hint}{printable(error.message)}", file=sys.stderr)
    return EXIT_INVALID if error.code in ("INVALID_ARGUMENT", "NOT_FOUND") else EXIT_NO_RESPONSE


def _files(paths: Sequence[Path]) -> Iterator[Path | ClientError]:
    """Yields files as they are, and the image files of each folder sorted by path."""
    for path in paths:
        if not os.path.isdir(path):  # unlike Path's method, without an error where nobody can tell
            yield path
            continue
        problems: list[OSError] = []
        files = (Path(folder, name) for folder, _, names in os.walk(path, onerror=problems.append) for name in names)
        inside = sorted(file for file in files if file.suffix.lower() in EXTENSIONS and os.path.isfile(file))
        yield from inside
        yield from (invalid_argument(f"{problem.filename}: {problem.strerror}") for problem in problems)
        if not inside and not problems:
            yield invalid_argument(f"{path}: no images in this folder")


def _batched(files: Iterator[Path | ClientError]) -> Iterator[list[Path | ClientError]]:
    batch = []
    for file in files:
        batch.append(file)
        if len(batch) == _BATCH_FILES:
            yield batch
            batch = []
    if batch:
        yield batch


def _prepare(
    files: Sequence[Path | ClientError], prepare: Callable[[Path], Prepared]
) -> Iterator[Prepared | ClientError]:
    """Reads or decodes files in threads, as Pillow's decoders release the GIL. Yields in the order of the files."""

    def prepare_one(file: Path | ClientError) -> Prepared | ClientError:
        try:
            return file if isinstance(file, ClientError) else prepare(file)
        except ClientError as error:
            return error

    with ThreadPoolExecutor(_NUM_DECODERS) as pool:
        yield from pool.map(prepare_one, files)


def _classify_files(
    ask: Callable[[Sequence[Prepared]], Sequence[Classification]], files: Sequence[Prepared]
) -> Iterator[Classification | ClientError]:
    """Classifies files that the server reads. If it refuses them, asks for each alone: others are classified."""
    try:
        yield from ask(files)
    except ClientError as error:
        if error.code != "INVALID_ARGUMENT":
            raise
        if len(files) == 1:
            yield invalid_argument(f"{files[0].name}: {error.message}")
            return
        for file in files:
            yield from _classify_files(ask, [file])


def _without_errors(results: Iterable[Result | ClientError]) -> list[Result]:
    """Returns the others, and prints the errors."""
    worked = list[Result]()
    for result in results:
        if isinstance(result, ClientError):
            print(f"error: {result.message}", file=sys.stderr)
        else:
            worked.append(result)
    return worked


def _rows(results: Sequence[Classification]) -> Iterator[Row]:
    """Yields the rows of the table, and prints warnings to standard error."""
    for result in results:
        if result.warning:
            print(f"warning: {result.name} {result.warning}; --invert inverts the image", file=sys.stderr)
        for prediction in result.predictions:
            yield result.name, prediction.label, f"{prediction.probability:.4f}"
