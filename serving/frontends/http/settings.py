"""Where the HTTP front end listens, and what it offers to browsers."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class PageSettings:
    """The page that the server shows at `/`.

    Args:
        save_images: folder for images that users label; None if they may not.
        num_workers: processes behind the port: the page shows figures of one.
    """

    save_images: Path | None = None
    num_workers: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    """The hosts and ports to listen on, and what browsers get. Port 0 takes any free port.

    Args:
        metrics_port: None to serve no metrics.
        metrics_host: None for the same as `host`.
        cors_origins: of web pages that may call the API; `*` for all.
        page: None to show no page at `/`.
        reuse_port: whether other processes listen on the API's port too; the kernel spreads connections over them.
    """

    host: str
    port: int
    metrics_port: int | None
    metrics_host: str | None = None
    cors_origins: tuple[str, ...] = ()
    page: PageSettings | None = None
    reuse_port: bool = False
