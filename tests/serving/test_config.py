"""The command line's own sense."""

from pathlib import Path

import pytest

from serving.config import ServeConfig
from serving.errors import StartupError

FILE = Path("x.pem")


@pytest.mark.parametrize(
    ("options", "transport"),
    [
        ({}, "native"),
        ({"host": "127.8.0.1"}, "native"),
        ({"host": "localhost"}, "native"),
        ({"host": "::1"}, "native"),
        ({"host": "0.0.0.0"}, "grpcio"),
        ({"host": "127.example.org"}, "grpcio"),
        ({"host": "10.0.0.1"}, "grpcio"),
        ({"host": "0.0.0.0", "grpc_socket": Path("s")}, "native"),
        ({"tls_cert": FILE, "tls_key": FILE}, "grpcio"),
        ({"host": "0.0.0.0", "transport": "native"}, "native"),
        ({"transport": "grpcio"}, "grpcio"),
    ],
)
def test_auto_takes_native_only_where_it_is_safe(options: dict, transport: str) -> None:
    config = ServeConfig(model_repository=Path(), **options)
    config.check()
    assert config.choose_transport()[0] == transport


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"grpc_port": 70000}, "--grpc-port 70000: must be between 0 and 65535"),
        ({"max_queue_size": 0}, "--max-queue-size 0: must be positive"),
        ({"max_message_bytes": 2**31}, "--max-message-bytes 2147483648: must be between 1 and 2147483647"),
        ({"max_message_bytes": 0}, "--max-message-bytes 0: must be between 1 and 2147483647"),
        ({"num_threads": -1}, "--num-threads -1: must be positive"),
        ({"drain_delay_s": float("nan")}, "--drain-delay-s nan: must not be negative"),
        ({"tls_cert": FILE}, "--tls-cert and --tls-key belong together"),
        ({"tls_client_ca": FILE}, "--tls-client-ca needs --tls-cert and --tls-key"),
        ({"load_model": ("m",)}, "--load-model needs --model-control-mode explicit"),
        ({"transport": "native", "tls_cert": FILE, "tls_key": FILE}, "--transport native has no TLS"),
    ],
)
def test_nonsense_is_refused_by_name(options: dict, said: str) -> None:
    with pytest.raises(StartupError, match=said):
        ServeConfig(model_repository=Path(), **options).check()


def test_addresses() -> None:
    assert ServeConfig(model_repository=Path(), host="::1").grpc_address == "[::1]:8001"
    assert ServeConfig(model_repository=Path(), grpc_port=0).grpc_address == "127.0.0.1:0"
    assert ServeConfig(model_repository=Path(), grpc_socket=Path("/s")).grpc_address == "unix:/s"
