"""Which names of hosts another site can have."""

import pytest

from convoy.same_origin import HostCheck, host_check, is_own_page

PAGES = ("https://shop.example", "http://lab.example:3000")


@pytest.mark.parametrize(
    "host",
    [
        *("", None, "localhost", "localhost:8000", "LOCALHOST.", "serving", "my_service:8000"),
        *("127.0.0.1", "127.0.0.1:8000", "10.0.0.7:8000", "127.1", "[::1]", "[::1]:8000", "[fe80::1%25eth0]:80"),
        *("app.localhost:8000", "printer.local", "host.docker.internal:8000"),
        *("serving.team.svc", "serving.team.svc.cluster.local:8000"),
        *("shop.example", "SHOP.example:8000", "shop.example.", "lab.example"),
    ],
)
def test_names_that_no_other_site_has(host: str | None) -> None:
    assert not HostCheck(PAGES).refuses(host)


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8000", "EVIL.EXAMPLE.", "127.0.0.1.evil.example", "a.shop.example"),
        *("local.evil.example", "localhost.evil.example:80", "évil.example"),
        *("[::1", "..", "evil.example/.local", "evil.example#.local", "a@b.local", "evil.example?.local"),
    ],
)
def test_names_that_another_site_has_and_malformed_ones(host: str) -> None:
    assert HostCheck(PAGES).refuses(host)


def test_only_a_server_on_loopback_checks_names() -> None:
    assert host_check("0.0.0.0", ()) is None
    assert host_check("10.0.0.7", ()) is None
    assert host_check("127.0.0.1", ("*",)) is None
    for host in ("127.0.0.1", "::1", "localhost"):
        check = host_check(host, ())
        assert check is not None
        assert check.refuses("shop.example")


@pytest.mark.parametrize(
    ("origin", "host", "is_own"),
    [
        (None, "", True),
        ("http://localhost:8000", "localhost:8000", True),
        ("https://localhost", "localhost", True),
        ("http://localhost:3000", "localhost:8000", False),
        ("null", "", False),
        ("null", "null", False),
    ],
)
def test_a_page_is_the_servers_own_if_its_origin_is_the_host(origin: str | None, host: str, is_own: bool) -> None:
    assert is_own_page(origin, host) is is_own
