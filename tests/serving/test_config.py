"""The server's options: validation, help, and the transport that auto selects."""

import re
from pathlib import Path
from typing import Any

import pytest

from serving.__main__ import main
from serving.config import ServeConfig
from serving.errors import LoadError, StartupError
from serving.inference.rate_limiter import Resource
from serving.models.loader import LoadSettings

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
def test_auto_selects_native_only_where_it_is_safe(options: dict, transport: str) -> None:
    config = ServeConfig(model_repository=Path(), **options)
    config.check()
    assert config.choose_transport()[0] == transport


def test_the_memory_of_requests_is_a_quarter_of_what_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.config.available_memory", lambda: 4 << 30)

    def memory(**options: Any) -> int:
        return ServeConfig(model_repository="models", **options).message_memory_bytes

    assert (memory(), memory(workers=2), memory(message_memory_mb=100)) == (1 << 30, 1 << 29, 100 << 20)
    assert memory(max_message_bytes=2 << 30) == 2 << 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grpc_port": 70000}, "--grpc-port 70000: must be between 0 and 65535"),
        ({"max_queue_size": 0}, "--max-queue-size 0: must be positive"),
        ({"max_message_bytes": 2**31}, "--max-message-bytes 2147483648: must be between 1 and 2147483647"),
        ({"max_message_bytes": 0}, "--max-message-bytes 0: must be between 1 and 2147483647"),
        ({"message_memory_mb": 63}, "--message-memory-mb 63: must hold --max-message-bytes 67108864"),
        ({"num_threads": -1}, "--num-threads -1: must be positive"),
        ({"batch_timeout_s": -1.0}, "--batch-timeout-s -1.0: must not be negative"),
        ({"batch_timeout_s": float("inf")}, "--batch-timeout-s inf: must not be negative"),
        ({"drain_delay_s": float("nan")}, "--drain-delay-s nan: must not be negative"),
        ({"tls_cert": FILE}, "--tls-cert and --tls-key must be set together"),
        ({"tls_client_ca": FILE}, "--tls-client-ca needs --tls-cert and --tls-key"),
        ({"load_model": ("m",)}, "--load-model needs --model-control-mode explicit"),
        ({"transport": "native", "tls_cert": FILE, "tls_key": FILE}, "--transport native has no TLS"),
        ({"workers": 0}, "--workers 0: must be positive"),
        ({"workers": 2, "grpc_socket": FILE}, "--workers needs --grpc-port"),
        ({"workers": 2, "allow_client_shm": True}, "--allow-client-shm needs --workers 1"),
        ({"response_cache_mb": -1}, "--response-cache-mb -1: must not be negative"),
        ({"rate_limit_resource": ("r:2", "r")}, "--rate-limit-resource r: must be NAME:COUNT or NAME:COUNT:GPU"),
        ({"trace_sample": 1.5}, r"--trace-sample 1\.5: must be between 0 and 1"),
        ({"trace_endpoint": "collector:4318"}, "--trace-endpoint collector:4318: must be a URL that begins with http"),
    ],
)
def test_invalid_options_are_rejected_by_name(options: dict, message: str) -> None:
    with pytest.raises(StartupError, match=message):
        ServeConfig(model_repository=Path(), **options).check()


@pytest.mark.parametrize(
    ("options", "is_plain"),
    [
        ({"host": "0.0.0.0"}, True),
        ({"host": "::"}, True),
        ({"host": "serving.example.org"}, True),
        ({"host": "0.0.0.0", "grpc_socket": Path("s")}, True),  # HTTP has no socket
        ({"host": "0.0.0.0", "tls_cert": FILE, "tls_key": FILE}, False),
        ({"host": "127.0.0.1"}, False),
        ({"host": "::1", "grpc_socket": Path("s")}, False),
    ],
)
def test_tokens_travel_in_plain_text_over_a_network_without_tls(options: dict, is_plain: bool) -> None:
    assert ServeConfig(model_repository=Path(), token_file=FILE, **options).sends_tokens_in_plain_text == is_plain
    assert not ServeConfig(model_repository=Path(), **options).sends_tokens_in_plain_text


def test_addresses() -> None:
    assert ServeConfig(model_repository=Path(), host="::1").grpc_address == "[::1]:8001"
    assert ServeConfig(model_repository=Path(), grpc_port=0).grpc_address == "127.0.0.1:0"
    assert ServeConfig(model_repository=Path(), grpc_socket=Path("/s")).grpc_address == "unix:/s"


def test_the_help_shows_each_option_with_one_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(re.sub("[╭─╮│╰╯]", " ", capsys.readouterr().out).split())
    assert text.count("(default: ") + text.count("(required)") == len(ServeConfig.__slots__)
    assert "None" not in text
    assert "(default: )" not in text
    num_threads = text.partition("--num-threads INT ")[2]
    assert num_threads.startswith("CPU threads of each model version, shared among its instances.")
    assert num_threads.partition(" --")[0].endswith("(default: the CPUs that the process may use)")


def test_the_settings_of_loads_follow_the_options() -> None:
    options: dict[str, Any] = {
        "rate_limit": "execution_count",
        "rate_limit_resource": ("r:2", "r:3:1"),
        "response_cache_mb": 2,
    }
    settings = LoadSettings.from_config(ServeConfig(model_repository=Path(), **options))
    assert settings.cache is not None
    assert settings.cache.max_bytes == 2 << 20
    assert settings.limiter is not None
    settings.limiter.register([Resource("r", 3)], 1, 1)
    with pytest.raises(LoadError, match="needs 3 of the resource 'r', but the server has 2"):
        settings.limiter.register([Resource("r", 3)], None, 1)
    plain = LoadSettings.from_config(ServeConfig(model_repository=Path(), response_cache_mb=0))
    assert (plain.cache, plain.limiter) == (None, None)
