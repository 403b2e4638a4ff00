"""The options of the server."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from convoy.cpus import available_memory
from convoy.options import option
from convoy.same_origin import is_loopback
from serving.errors import StartupError
from serving.inference.rate_limiter import parse_resource
from serving.observability.logging import LogFormat

TransportChoice = Literal["auto", "native", "grpcio"]
ControlMode = Literal["none", "poll", "explicit"]
RateLimitChoice = Literal["off", "execution_count"]
DeviceChoice = Literal["auto", "cpu", "cuda"]
WebChoice = Literal["auto", "on", "off"]

MAX_MESSAGE_BYTES = 2**31 - 1
"""The limit of gRPC and Protocol Buffers."""
_SHARE_OF_MEMORY = 4
"""The part of the memory that requests may take: a fourth, because they are copied while they are read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Serves the models of a repository over gRPC and HTTP (Open Inference Protocol).

    Exit codes: 0 after SIGTERM or Ctrl-C, once all requests are finished; 1 if the grace period ended first; 2 if the
    server cannot start.
    """

    model_repository: Annotated[str, option("PATH")]
    """Folder with one folder for each model, or s3://BUCKET/models, hf://USER/NAME (pip install '.[remote]')."""
    model_cache: Annotated[Path | None, option("PATH", "~/.cache/convoy/repositories")] = None
    """Folder for the copies of repositories at an address."""
    model_control_mode: ControlMode = "none"
    """none: load all models at the start. poll: also follow changes. explicit: load by --load-model or on request."""
    load_model: Annotated[tuple[str, ...], option("[NAME ...]", "none")] = ()
    """Models to load at the start, with --model-control-mode explicit."""
    poll_interval_s: float = 2.0
    """Seconds between two scans of the folder, with --model-control-mode poll."""
    load_threads: int = 4
    """Models that are opened at the same time, if memory allows. Their warm-ups, which measure time, take turns."""
    allow_model_code: bool = False
    """Load models that are code (model.py) or may run it (model.pt2). Whoever can write them can then run code here."""

    transport: TransportChoice = "auto"
    """gRPC server. native: faster; no TLS, trusted networks only. grpcio: for all else. auto: native on loopback."""
    host: Annotated[str, option("HOST", "127.0.0.1")] = "127.0.0.1"
    """Address to listen on; 0.0.0.0 or :: for all interfaces."""
    grpc_port: int = 8001
    """Port of gRPC. Here, as for --http-port and --metrics-port, 0 takes any free port, which the log shows."""
    grpc_socket: Annotated[Path | None, option("PATH", "none")] = None
    """Unix socket to listen on for gRPC, in place of --grpc-port."""
    http_port: int = 8000
    """Port of the REST API (Open Inference Protocol v2)."""
    cors_origin: Annotated[tuple[str, ...], option("[ORIGIN ...]", "none")] = ()
    """Web pages that may call the REST API from a browser, such as https://shop.example:8443; * for all pages."""
    web: WebChoice = "auto"
    """Show a page at / of the REST API's port, to try models and watch the server. auto: if --host is of loopback."""
    save_images: Annotated[Path | None, option("FOLDER", "users cannot save images")] = None
    """Folder for images that the page's users label, as `convoy train FOLDER` reads it; at most 10,000 images."""
    metrics_port: int = 8002
    """Port of /metrics for Prometheus, and of /v2/health/live and /v2/health/ready for probes; always without TLS."""
    metrics_host: Annotated[str | None, option("HOST", "the same as --host")] = None
    """Address to listen on for the port of metrics."""

    allow_client_shm: bool = False
    """Let clients name shared memory in place of tensors: they can read and change any that this process may."""

    workers: int = 1
    """Processes behind the same ports, each with all models and a part of the CPU threads; for more than 4 cores."""
    device: DeviceChoice = "auto"
    """auto: GPUs if there are any, else CPUs. cpu: CPUs only. cuda: GPUs; the server does not start without one."""
    num_threads: Annotated[int | None, option("INT", "the CPUs that the process may use")] = None
    """CPU threads of each model version, shared among its instances. Different versions do not share them."""
    max_queue_size: int = 1024
    """Requests that may wait for one model, unless its configuration sets another number."""
    response_cache_mb: int = 64
    """Megabytes of each process for responses of models whose configuration enables response_cache. 0: none."""
    rate_limit: RateLimitChoice = "off"
    """execution_count: instances wait for the resources of their instance_group.rate_limiter. off: they do not."""
    rate_limit_resource: Annotated[tuple[str, ...], option("[NAME:COUNT[:GPU] ...]", "what one instance needs")] = ()
    """How much there is of a resource, on each device or on one GPU (or cpu), with --rate-limit execution_count."""
    batch_timeout_s: float = 60.0
    """Seconds until a batch's instance counts as hung, at least 10 times the slowest of warm-up. 0: no limit."""
    max_message_bytes: int = 64 << 20
    """Size of the largest request, in bytes."""
    message_memory_mb: Annotated[int | None, option("INT", "a quarter of its memory")] = None
    """Megabytes of each process for requests over 64 KiB that arrive, wait or run. Further ones are refused."""

    drain_delay_s: float = 0.0
    """Seconds to serve on after SIGTERM while health reports NOT_SERVING, so that load balancers stop sending."""
    grace_s: float = 30.0
    """Seconds, after the drain delay, to finish requests. The process exits at most 4 s later."""

    tls_cert: Annotated[Path | None, option("PATH", "no TLS")] = None
    """Certificate chain of the server, PEM. The server reloads this and the next three files when they change."""
    tls_key: Annotated[Path | None, option("PATH", "no TLS")] = None
    """Private key of the certificate, PEM."""
    tls_client_ca: Annotated[Path | None, option("PATH", "clients need no certificate")] = None
    """Certificates of the authority that signs client certificates, PEM. Requires clients to use one (mutual TLS)."""
    token_file: Annotated[Path | None, option("PATH", "clients need no token")] = None
    """Tokens, one a line, with names, scopes and quotas (docs/serving-security.md). Clients must send one."""

    log_format: LogFormat = "text"
    """text: one plain line per event. json: one JSON object per line."""
    access_log: bool = False
    """Log one line for each RPC."""

    trace_endpoint: Annotated[str | None, option("URL", "no tracing")] = None
    """OpenTelemetry collector that gets traces of inferences, OTLP over HTTP (pip install '.[tracing]')."""
    trace_sample: float = 0.01
    """Share of the inferences that are traced. Those that come with a W3C traceparent follow its sampled flag."""

    def check(self) -> None:
        """Checks the values.

        Raises:
            StartupError: names the option and its valid values.
        """
        for name in ("grpc_port", "http_port", "metrics_port"):
            self._require(name, "must be between 0 and 65535", 0 <= getattr(self, name) <= 65535)
        self._check_workers()
        for name in ("max_queue_size", "poll_interval_s", "load_threads", "workers"):
            self._require(name, "must be positive", getattr(self, name) > 0)
        in_range = 0 < self.max_message_bytes <= MAX_MESSAGE_BYTES
        self._require("max_message_bytes", f"must be between 1 and {MAX_MESSAGE_BYTES}", in_range)
        is_enough = self.message_memory_mb is None or self.message_memory_mb << 20 >= self.max_message_bytes
        self._require("message_memory_mb", f"must hold --max-message-bytes {self.max_message_bytes}", is_enough)
        for name in ("response_cache_mb", "batch_timeout_s", "drain_delay_s", "grace_s"):
            self._require(name, "must not be negative", 0 <= getattr(self, name) < float("inf"))
        self._require("num_threads", "must be positive", self.num_threads is None or self.num_threads > 0)
        self._require("trace_sample", "must be between 0 and 1", 0 <= self.trace_sample <= 1)
        is_url = self.trace_endpoint is None or self.trace_endpoint.startswith(("http://", "https://"))
        self._require("trace_endpoint", "must be a URL that begins with http:// or https://", is_url)
        self._check_lists()
        if (self.tls_cert is None) != (self.tls_key is None):
            raise StartupError("--tls-cert and --tls-key must be set together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise StartupError("--tls-client-ca needs --tls-cert and --tls-key")
        if self.load_model and self.model_control_mode != "explicit":
            raise StartupError("--load-model needs --model-control-mode explicit")
        if self.save_images is not None and not self.shows_page:
            raise StartupError("--save-images needs the page: set --web on")
        if self.transport == "native" and self.tls_cert is not None:
            raise StartupError("--transport native has no TLS: use --transport grpcio")

    @property
    def available_resources(self) -> dict[tuple[str, str], int]:
        """How much there is of each resource, by name and device."""
        return dict(filter(None, map(parse_resource, self.rate_limit_resource)))

    @property
    def message_memory_bytes(self) -> int:
        """Memory of one process for large requests, in bytes."""
        if self.message_memory_mb is not None:
            return self.message_memory_mb << 20
        return max(self.max_message_bytes, available_memory() // (_SHARE_OF_MEMORY * self.workers))

    def _check_workers(self) -> None:
        if self.workers > 1 and self.grpc_socket is not None:
            raise StartupError("--workers needs --grpc-port: processes cannot share a Unix socket")
        if self.workers > 1 and self.allow_client_shm:
            raise StartupError("--allow-client-shm needs --workers 1: each process would have regions of its own")

    def _check_lists(self) -> None:
        for resource in self.rate_limit_resource:
            if parse_resource(resource) is None:
                raise StartupError(f"--rate-limit-resource {resource}: must be NAME:COUNT or NAME:COUNT:GPU")
        for origin in self.cors_origin:
            if not re.fullmatch(r"\*|https?://[^/\s*@]+", origin):
                raise StartupError(f"--cors-origin {origin}: must be http:// or https:// with a host and no path, or *")

    def _require(self, name: str, requirement: str, is_met: bool) -> None:
        if not is_met:
            raise StartupError(f"--{name.replace('_', '-')} {getattr(self, name)}: {requirement}")

    @property
    def grpc_address(self) -> str:
        """The address of gRPC: `host:port` or `unix:/path`."""
        if self.grpc_socket is not None:
            return f"unix:{self.grpc_socket.absolute()}"
        return f"[{self.host}]:{self.grpc_port}" if ":" in self.host else f"{self.host}:{self.grpc_port}"

    @property
    def shows_page(self) -> bool:
        """Whether the server shows a page at `/`."""
        return self.web == "on" or (self.web == "auto" and is_loopback(self.host))

    @property
    def sends_tokens_in_plain_text(self) -> bool:
        """Whether tokens travel unencrypted over a network."""
        return self.token_file is not None and self.tls_cert is None and not is_loopback(self.host)

    def choose_transport(self) -> tuple[Literal["native", "grpcio"], str]:
        """Returns the transport and the reason for it."""
        if self.transport != "auto":
            return self.transport, "set by --transport"
        if self.tls_cert is not None:
            return "grpcio", "TLS"
        if self.grpc_socket is not None:
            return "native", "Unix socket"
        if is_loopback(self.host):
            return "native", "loopback"
        return "grpcio", "not on loopback, and native checks the size of a message only once it is in memory"
