"""The client's command line: `classify` for image files, `status` for the server and its models.

Exit codes: 0 all done; 1 some image could not be read (the others are classified); 2 the request cannot be done (faulty
command line, unknown model); 3 the server does not answer, or fails; 130 Ctrl-C; 141 nobody reads the output any more.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import tyro

from serving.client.client import DEFAULT_TARGET, DEFAULT_TIMEOUT_S, Client
from serving.client.connection import Tls
from serving.client.display import Row, json_line, show_table
from serving.client.errors import ClientError, invalid
from serving.client.images import EXTENSIONS, ImageInput, Prepared
from serving.client.results import Classification

Config = TypeVar("Config")

BAD_IMAGE = 1
FAULTY = 2
NO_ANSWER = 3
_GROUP = 256
"""Files decoded before they are sent: a folder of any size takes the memory of these."""
_NUM_DECODERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectConfig:
    """Where the server is and how to reach it."""

    target: str = DEFAULT_TARGET
    """HOST:PORT or unix:/PATH."""
    timeout_s: float = DEFAULT_TIMEOUT_S
    """How long a call may take, all attempts together."""
    token_file: Path | None = None
    """File with the bearer token to send."""
    tls: bool = False
    """Talk TLS; implied by the other three."""
    tls_ca: Path | None = None
    """PEM file of the authorities to trust. [default: those that gRPC brings]"""
    tls_cert: Path | None = None
    """PEM file of this client's certificate, where the server wants one."""
    tls_key: Path | None = None
    """PEM file of its key."""

    def client(self) -> Client:
        """A client for it.

        Raises:
            ClientError: unreadable files, or an impossible target.
        """
        tls = Tls(ca=self.tls_ca, certificate=self.tls_cert, key=self.tls_key)
        wants_tls = self.tls or tls != Tls()
        if not self.timeout_s > 0:
            raise invalid(f"--timeout-s {self.timeout_s:g}: must be more than 0")
        return Client(self.target, timeout_s=self.timeout_s, token=self._token(), tls=tls if wants_tls else None)

    def _token(self) -> str | None:
        if self.token_file is None:
            return None
        try:
            token = self.token_file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise invalid(f"cannot read a token from {self.token_file}: {error}") from error
        if not token:
            raise invalid(f"{self.token_file} holds no token")
        return token


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyConfig:
    """Tell what images show. Files are resized and made grey or RGB as the model needs.

    Exit codes: 0 all done; 1 some image could not be read (the others are classified); 2 the request cannot be done
    (faulty command line, unknown model); 3 the server does not answer, or fails; 130 Ctrl-C; 141 nobody reads the
    output any more.
    """

    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...")]
    """Image files, and folders of them."""
    model: str
    """The model's name."""
    version: str = ""
    """Its version. [default: the newest]"""
    top_k: int = 3
    """How many classes to tell of each image."""
    invert: bool = False
    """Take the negatives: for dark digits on white paper and a model that learned light ones on black."""
    json: bool = False
    """One line of JSON for each image instead of a table."""
    connect: Annotated[ConnectConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=ConnectConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusConfig:
    """Tell how the server and its models are."""

    connect: Annotated[ConnectConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=ConnectConfig)


def main(arguments: Sequence[str]) -> NoReturn:
    """Run the verb and end the process."""
    sys.exit(_guarded(lambda: _run(arguments)))


def _run(arguments: Sequence[str]) -> int:
    verbs: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
        "classify": ("tell what images show", lambda rest: classify(_parse(ClassifyConfig, rest, "classify"))),
        "status": ("tell how the server and its models are", lambda rest: status(_parse(StatusConfig, rest, "status"))),
    }
    usage = "usage: python -m serving.client VERB [OPTIONS]\n\n" + "\n".join(
        f"  {verb:10s} {what}" for verb, (what, _) in verbs.items()
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage + "\n\npython -m serving.client VERB --help tells its options")
        return 0 if arguments else FAULTY
    if arguments[0] not in verbs:
        print(f"error: no verb {arguments[0]!r}\n{usage}", file=sys.stderr)
        return FAULTY
    return verbs[arguments[0]][1](arguments[1:])


def classify(config: ClassifyConfig) -> int:
    """`classify`: the exit code."""
    if not config.images:
        raise invalid("no images given")
    if config.top_k < 1:
        raise invalid(f"--top-k {config.top_k}: must be at least 1")
    exit_code, rows = 0, list[Row]()
    with config.connect.client() as client:
        given = client.image_input(config.model, config.version)
        for group in _groups(_files(config.images)):
            prepared = []
            for item in _prepare(group, given, invert=config.invert):
                if isinstance(item, Prepared):
                    prepared.append(item)
                else:
                    exit_code = BAD_IMAGE
                    print(f"error: {item.message}", file=sys.stderr)
            results = client.classify(config.model, prepared, top_k=config.top_k, version=config.version)
            if config.json:
                for line in map(json_line, results):
                    print(line, flush=True)
            else:
                rows += _rows(results)
    show_table(("file", "label", "probability"), rows)
    return exit_code


def status(config: StatusConfig) -> int:
    """`status`: the exit code."""
    with config.connect.client() as client:
        server, is_ready, models = client.server(), client.is_ready(), client.index()
    print(f"{server.name} {server.version} at {config.connect.target}: {'ready' if is_ready else 'not ready'}")
    rows = [(model.name, model.version, model.state, model.reason) for model in models]
    show_table(("model", "version", "state", "reason"), rows)
    return 0


def _parse(kind: type[Config], arguments: Sequence[str], verb: str) -> Config:
    flags = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(kind, args=arguments, prog=f"python -m serving.client {verb}", config=flags)


def _guarded(command: Callable[[], int]) -> int:
    """The exit code; what the user should know of a failure in one line."""
    try:
        return command()
    except ClientError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return FAULTY if error.code in ("INVALID_ARGUMENT", "NOT_FOUND") else NO_ANSWER


def _files(given: Sequence[Path]) -> Iterator[Path | ClientError]:
    """The files named, and those of the folders named in the order of their names."""
    for path in given:
        if not path.is_dir():
            yield path
            continue
        inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file())
        yield from inside
        if not inside:
            yield invalid(f"{path}: no images in this folder")


def _groups(files: Iterator[Path | ClientError]) -> Iterator[list[Path | ClientError]]:
    group = []
    for file in files:
        group.append(file)
        if len(group) == _GROUP:
            yield group
            group = []
    if group:
        yield group


def _prepare(
    group: Sequence[Path | ClientError], given: ImageInput, *, invert: bool
) -> Iterator[Prepared | ClientError]:
    """In order; Pillow's decoders leave the GIL."""

    def prepare(file: Path | ClientError) -> Prepared | ClientError:
        try:
            return file if isinstance(file, ClientError) else given.prepare(file, invert=invert)
        except ClientError as error:
            return error

    with ThreadPoolExecutor(_NUM_DECODERS) as pool:
        yield from pool.map(prepare, group)


def _rows(results: Sequence[Classification]) -> Iterator[Row]:
    """Rows of the table; warnings go to stderr."""
    for result in results:
        if result.warning:
            print(f"warning: {result.name} {result.warning}; --invert takes the negative", file=sys.stderr)
        for found in result.predictions:
            yield result.name, found.label, f"{found.probability:.4f}"
