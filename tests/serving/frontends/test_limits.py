"""Limits of open calls, files and connections."""

import resource
from collections.abc import Iterator

import pytest

from convoy.open_files import MAX_OPEN_FILES
from serving.errors import ResourceExhausted
from serving.frontends.common import limits
from serving.frontends.common.limits import OpenCalls
from serving.observability.refusals import Refusals


class TestOpenCalls:
    def test_their_number_is_limited(self) -> None:
        calls = OpenCalls("Watch", Refusals(), 2)
        calls.open("ipv4:10.0.0.1:1000")
        calls.open("ipv4:10.0.0.2:1000")
        with pytest.raises(ResourceExhausted, match="serves at most 2 Watch calls at a time"):
            calls.open("ipv4:10.0.0.3:1000")
        calls.close("ipv4:10.0.0.1:1000")
        calls.open("ipv4:10.0.0.3:1000")

    @pytest.mark.parametrize(
        ("one", "same_host", "other"),
        [
            ("ipv4:10.0.0.1:1000", "ipv4:10.0.0.1:2000", "ipv4:10.0.0.2:1000"),
            ("ipv6:[fe80::1]:1000", "ipv6:[fe80::1]:2000", "ipv6:[fe80::2]:1000"),
        ],
    )
    def test_their_number_of_one_host_is_limited(self, one: str, same_host: str, other: str) -> None:
        calls = OpenCalls("Watch", Refusals(), 10, per_host=1)
        calls.open(one)
        with pytest.raises(ResourceExhausted, match="at most 1 Watch calls of one host"):
            calls.open(same_host)
        calls.open(other)
        calls.close(one)
        calls.open(same_host)

    @pytest.mark.parametrize("peer", ["unix:", "unix:7", "unix-abstract:name", ""])
    def test_unix_sockets_have_no_host(self, peer: str) -> None:
        calls = OpenCalls("Watch", Refusals(), 3, per_host=1)
        for _ in range(3):
            calls.open(peer)
        with pytest.raises(ResourceExhausted, match="at most 3"):
            calls.open(peer)


class TestFileLimit:
    @pytest.fixture(autouse=True)
    def soft_limit(self) -> Iterator[int]:
        """The soft limit that systemd gives, or less if the hard one is lower."""
        before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        soft = 1024 if hard == resource.RLIM_INFINITY else min(1024, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        yield soft
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))

    def test_is_raised_to_the_hard_limit(self) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        expected = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
        assert limits.raise_file_limit() == expected
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (expected, hard)
        assert limits.raise_file_limit() == expected

    def test_a_system_that_refuses_keeps_its_limit(self, soft_limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise ValueError("current limit exceeds maximum limit")

        with monkeypatch.context() as patch:
            patch.setattr(resource, "setrlimit", refuse)
            assert limits.raise_file_limit() == soft_limit

    def test_one_front_end_gets_less_than_half_of_it(self, soft_limit: int) -> None:
        assert 0 < limits.max_connections() < soft_limit / 2
