"""The command line of `python -m trainer.service`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from convoy.options import check_port, option
from trainer.service.embedded import default_store, engine_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """Runs submitted trainings, one after another as the machine has room, and answers for them over gRPC and REST."""

    store: Annotated[str, option("FILE", "~/.local/state/convoy/jobs.db")] = field(
        default_factory=lambda: str(default_store())
    )
    """The file with the jobs, or postgresql://USER@HOST/NAME. Several services may share one: one of them leads."""
    host: Annotated[str, option("HOST", "127.0.0.1")] = "127.0.0.1"
    """Address to listen on. Another one than this machine's own needs --token-file."""
    port: int = 8003
    """Port of gRPC; 0 for any that is free."""
    http_port: int = 8004
    """Port of the REST API; 0 for any that is free."""
    web: Literal["auto", "on", "off"] = "auto"
    """Show a page at / of the REST API's port, to watch trainings. auto: if --host is of loopback."""
    metrics_port: int = 8005
    """Port of the metrics for Prometheus; 0 for any that is free."""
    token_file: Annotated[Path | None, option("FILE", "none")] = None
    """Tokens of the callers, with the scopes submit (own jobs) and admin (all jobs); see docs/serving-security.md."""
    tls_certificate: Annotated[Path | None, option("FILE", "none")] = None
    """Certificate chain for TLS, PEM."""
    tls_key: Annotated[Path | None, option("FILE", "none")] = None
    """Its private key, PEM."""

    def check_ports(self) -> None:
        """Checks the ports.

        Raises:
            ValueError: names the option and its valid values.
        """
        for name in ("port", "http_port", "metrics_port"):
            check_port(f"--{name.replace('_', '-')}", getattr(self, name))

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the service."""
        return self.host in ("127.0.0.1", "::1", "localhost")

    @property
    def shows_page(self) -> bool:
        return self.web == "on" or (self.web == "auto" and self.is_local)

    @property
    def engine_folder(self) -> Path:
        """Where the engines keep the files of jobs."""
        return engine_folder(self.store)
