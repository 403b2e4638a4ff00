"""The tables of the job store, and how a connection to SQLite or PostgreSQL is made.

A write takes SQLite's only write lock when it begins, so that it never fails half-way because another process wrote
first; readers never wait (WAL). PostgreSQL locks the rows that a write changes.
"""

import os
import sqlite3
import time
import uuid
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url
from sqlalchemy.pool import NullPool

from convoy.extras import how_to_install
from convoy.named_files import check_regular
from trainer.errors import ConfigError

SCHEMA_VERSION = 1
CREATION_LOCK = 0x636F6E766F79
"""PostgreSQL's number of the lock under which the tables are created: "convoy" in ASCII."""
CONTROLLER = "controller"
"""The name of the only lease: that of the controller that leads."""
BUSY_TIMEOUT_S = 30
"""Longest wait of a write for another process's."""
_POSTGRES_TIMEOUTS = {"connect_timeout": 5, "tcp_user_timeout": 10_000}
_POSTGRES_TIMEOUTS |= {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
"""A host that is gone answers nothing: without these a call waits for it for minutes. The URL may have others."""

metadata = sa.MetaData()
_JSON = sa.JSON()

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("owner", sa.String, nullable=False),
    sa.Column("key", sa.String),
    sa.Column("spec", _JSON, nullable=False),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("reason", sa.String, nullable=False, default=""),
    sa.Column("engine", sa.String, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False, default=0),
    sa.Column("num_retries", sa.Integer, nullable=False, default=0),
    sa.Column("stop", sa.String, nullable=False, default=""),
    sa.Column("devices", _JSON, nullable=False),
    sa.Column("submitted_at", sa.Float, nullable=False),
    sa.Column("started_at", sa.Float),
    sa.Column("ended_at", sa.Float),
    sa.Column("not_before", sa.Float, nullable=False, default=0.0),
    sa.Column("exit_code", sa.Integer),
    sa.Column("failing_rank", sa.Integer),
    sa.Column("progress", _JSON, nullable=False),
    sa.Column("next_event", sa.Integer, nullable=False, default=1),
    sa.UniqueConstraint("owner", "key"),
    sa.Index("jobs_by_state", "state", "id"),
    sa.Index("jobs_by_owner", "owner", "id"),
    sqlite_autoincrement=True,  # a deleted job's number is never given again
)
events = sa.Table(
    "events",
    metadata,
    sa.Column("job_id", sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("time", sa.Float, nullable=False),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("data", _JSON, nullable=False),
)
leases = sa.Table(
    "leases",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("holder", sa.String, nullable=False),
    sa.Column("token", sa.Integer, nullable=False),
    sa.Column("expires_at", sa.Float, nullable=False),
)
identities = sa.Table(
    "convoy_jobs",
    metadata,
    sa.Column("schema_version", sa.Integer, primary_key=True),
    sa.Column("identity", sa.String, nullable=False),
)


def connect(url: str) -> sa.Engine:
    """Returns the engine of a database, with its tables created.

    Args:
        url: `sqlite:///PATH`, `postgresql://…`, or the path of an SQLite file.

    Raises:
        ConfigError: the database cannot be opened, or a newer version of Convoy made it.
    """
    try:
        address = _address(url)
    except sa.exc.ArgumentError:
        raise ConfigError("--store: must be the path of a file, or sqlite:///… or postgresql://…") from None
    try:
        engine = _create_engine(address)
        with engine.begin() as connection:
            if connection.dialect.name == "postgresql":  # two services may create the tables of a new store at once
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(CREATION_LOCK)))
            metadata.create_all(connection)
            found = connection.scalar(sa.select(sa.func.max(identities.c.schema_version)))
            if found is None:
                new = {"schema_version": SCHEMA_VERSION, "identity": uuid.uuid4().hex[:12]}
                connection.execute(identities.insert().values(new))
            if connection.scalar(sa.select(leases.c.name)) is None:
                free = {"name": CONTROLLER, "holder": "", "token": 0, "expires_at": 0.0}
                connection.execute(leases.insert().values(free))
    except ModuleNotFoundError as error:
        raise ConfigError(f"--store {_shown(address)} needs {error.name}: {how_to_install('postgres')}") from error
    except (sa.exc.SQLAlchemyError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else getattr(error, "orig", None)
        cause = str(reason or error).strip().splitlines()[0]
        raise ConfigError(f"the store {_shown(address)} cannot be opened: {cause}") from error
    if found is not None and found > SCHEMA_VERSION:
        raise ConfigError(f"a newer version of Convoy made the store {_shown(address)}: use that version")
    return engine


def _address(url: str) -> URL:
    if "://" not in url:
        return URL.create("sqlite", database=str(Path(url).absolute()))
    address = make_url(url)
    if address.get_backend_name() == "postgresql":
        return address.set(drivername="postgresql+psycopg")
    if address.get_backend_name() != "sqlite":
        raise ConfigError(f"--store {_shown(address)}: must be the path of a file, or sqlite:///… or postgresql://…")
    return address


def _create_engine(address: URL) -> sa.Engine:
    if address.get_backend_name() != "sqlite":
        timeouts = {name: value for name, value in _POSTGRES_TIMEOUTS.items() if name not in address.query}
        return sa.create_engine(address, pool_pre_ping=True, connect_args=timeouts)
    if address.database:
        check_regular(Path(address.database))
        Path(address.database).parent.mkdir(parents=True, exist_ok=True)
        # For this user alone: the variables of a job may hold keys.
        os.close(os.open(address.database, os.O_CREAT | os.O_RDONLY, 0o600))
    engine = sa.create_engine(address, poolclass=NullPool, connect_args={"timeout": BUSY_TIMEOUT_S})
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy's own BEGIN, not the driver's
    _use_wal(connection)
    for setting in ("synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {setting}")


def _use_wal(connection: sqlite3.Connection) -> None:
    """Gives a database a write-ahead log; while another process does so, too, SQLite refuses this without a wait."""
    until = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)
        else:
            return


def _begin_sqlite(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _shown(address: URL) -> str:
    return str(address.database) if address.get_backend_name() == "sqlite" else address.render_as_string()
