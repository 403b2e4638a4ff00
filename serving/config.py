"""The server's command line."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from serving.errors import StartupError
from serving.observability.logging import LogFormat

TransportChoice = Literal["auto", "native", "grpcio"]
ControlMode = Literal["none", "poll", "explicit"]
DeviceChoice = Literal["auto", "cpu", "cuda"]

MAX_MESSAGE_BYTES = 2**31 - 1
"""What gRPC and Protocol Buffers can count to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Serve the models of a repository over gRPC (Open Inference Protocol) and HTTP."""

    model_repository: Path
    """Folder with one folder a model, as `python -m trainer export` or Triton lay it out."""
    model_control_mode: ControlMode = "none"
    """none: load all at the start; poll: and follow changes; explicit: what --load-model names and clients ask for."""
    load_model: tuple[str, ...] = ()
    """With --model-control-mode explicit: models to load at the start."""
    poll_interval_s: float = 2.0
    """With --model-control-mode poll: how often the folder is looked at."""

    transport: TransportChoice = "auto"
    """native: fast, no TLS, messages bounded in memory only; grpcio: both; auto: native on loopback without TLS."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 or :: for all."""
    grpc_port: int = 8001
    """0 takes any free port, as for the other two; the log tells it."""
    grpc_socket: Path | None = None
    """Listen for gRPC on this Unix socket instead of --grpc-port."""
    http_port: int = 8000
    """REST (Open Inference Protocol v2)."""
    metrics_port: int = 8002
    """GET /metrics for Prometheus; and /v2/health/live and ready in plain text, for probes without a certificate."""

    device: DeviceChoice = "auto"
    """auto takes the GPUs if there are any."""
    num_threads: int | None = None
    """CPU threads for all model instances together. [default: what the container's quota grants]"""
    max_queue_size: int = 1024
    """Requests that may wait for one model, where its configuration does not say."""
    max_message_bytes: int = 64 << 20
    """Largest request."""

    drain_delay_s: float = 0.0
    """After SIGTERM: how long to go on serving, NOT_SERVING by the health service, until load balancers know."""
    grace_s: float = 30.0
    """Then: how long what is under way may take; the process ends at most 4 s later."""

    tls_cert: Path | None = None
    """Certificate chain (PEM). Read again when it changes, as are the other two."""
    tls_key: Path | None = None
    """Its private key."""
    tls_client_ca: Path | None = None
    """Ask callers for certificates that this authority has signed (mutual TLS)."""
    token_file: Path | None = None
    """Ask callers for `authorization: Bearer` and this file's content; health and metrics stay open."""

    log_format: LogFormat = "text"
    """json: one object a line."""
    access_log: bool = False
    """One line for each RPC."""

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            StartupError: it names the option and what it may be.
        """
        for name in ("grpc_port", "http_port", "metrics_port"):
            self._require(name, "must be between 0 and 65535", 0 <= getattr(self, name) <= 65535)
        for name in ("max_queue_size", "poll_interval_s"):
            self._require(name, "must be positive", getattr(self, name) > 0)
        in_range = 0 < self.max_message_bytes <= MAX_MESSAGE_BYTES
        self._require("max_message_bytes", f"must be between 1 and {MAX_MESSAGE_BYTES}", in_range)
        for name in ("drain_delay_s", "grace_s"):
            self._require(name, "must not be negative", 0 <= getattr(self, name) < float("inf"))
        self._require("num_threads", "must be positive", self.num_threads is None or self.num_threads > 0)
        if (self.tls_cert is None) != (self.tls_key is None):
            raise StartupError("--tls-cert and --tls-key belong together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise StartupError("--tls-client-ca needs --tls-cert and --tls-key")
        if self.load_model and self.model_control_mode != "explicit":
            raise StartupError("--load-model needs --model-control-mode explicit")
        if self.transport == "native" and self.tls_cert is not None:
            raise StartupError("--transport native has no TLS: use --transport grpcio")

    def _require(self, name: str, what: str, holds: bool) -> None:
        if not holds:
            raise StartupError(f"--{name.replace('_', '-')} {getattr(self, name)}: {what}")

    @property
    def grpc_address(self) -> str:
        """`host:port` or `unix:/path`."""
        if self.grpc_socket is not None:
            return f"unix:{self.grpc_socket.absolute()}"
        return f"[{self.host}]:{self.grpc_port}" if ":" in self.host else f"{self.host}:{self.grpc_port}"

    def choose_transport(self) -> tuple[Literal["native", "grpcio"], str]:
        """The transport, and why."""
        if self.transport != "auto":
            return self.transport, "as asked"
        if self.tls_cert is not None:
            return "grpcio", "TLS"
        if self.grpc_socket is not None:
            return "native", "a Unix socket"
        if _is_loopback(self.host):
            return "native", "loopback"
        return "grpcio", "not on loopback, and native has no limit on messages before they are in memory"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may lead anywhere
        return host == "localhost"
