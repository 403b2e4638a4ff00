"""The principals of tokens: rotation, deletion, scopes, and quotas that outlive a reload."""

import gc
import logging
import queue
import threading
import time
from pathlib import Path

import pytest

from convoy import auth, credentials
from convoy.auth import Principal, TokenFile
from convoy.credentials import CredentialError

SCOPES = ("infer", "admin", "metrics")


@pytest.fixture(autouse=True)
def _look_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "CHECK_INTERVAL_S", 0.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text("secret-1\n")
    path.chmod(0o600)
    return path


def replace(path: Path, text: str) -> None:
    temporary = path.with_name("new")
    temporary.write_text(text)
    temporary.replace(path)


def name_of(tokens: TokenFile, header: str | None) -> str | None:
    principal = tokens.find(header)
    return None if principal is None else principal.name


def test_a_token_alone_is_the_default_principal_with_all_scopes(path: Path) -> None:
    tokens = TokenFile(path, SCOPES)
    assert tokens.find("Bearer secret-1") == Principal("default", frozenset(SCOPES))
    assert tokens.find("bearer  secret-1 ") == Principal("default", frozenset(SCOPES))
    assert not tokens.lists("metrics")


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer secret-2",
        "Basic secret-1",
        "secret-1",
        "Bearer sécret-1",
        "Bearer \udcff",
    ],
)
def test_everything_else_is_refused(path: Path, header: str | None) -> None:
    assert TokenFile(path, SCOPES).find(header) is None


def test_tokens_overlap_during_a_rotation(path: Path) -> None:
    tokens = TokenFile(path, SCOPES)
    replace(path, "secret-1 name=alice scopes=infer\nsecret-2 name=alice scopes=infer\nx name=bob scopes=admin,metrics")
    assert [name_of(tokens, f"Bearer {token}") for token in ("secret-1", "secret-2", "x")] == ["alice", "alice", "bob"]
    bob = tokens.find("Bearer x")
    assert bob is not None
    assert bob.scopes == {"admin", "metrics"}
    assert tokens.lists("metrics")
    replace(path, "secret-2 name=alice scopes=infer\n")
    assert [name_of(tokens, f"Bearer {token}") for token in ("secret-1", "secret-2", "x")] == [None, "alice", None]


def test_a_deleted_file_ends_its_tokens(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_text("secret-1 name=a scopes=infer,metrics")
    tokens = TokenFile(path, SCOPES)
    path.unlink()
    assert tokens.find("Bearer secret-1") is None
    assert tokens.lists("metrics")  # what was guarded stays so
    assert "is no longer accepted" in caplog.text
    replace(path, "secret-2")
    assert name_of(tokens, "Bearer secret-2") == "default"


def test_an_invalid_change_keeps_the_tokens_for_a_while(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens = TokenFile(path, SCOPES)
    for content in ("", "secret-2 nam=alice"):
        replace(path, content)
        assert name_of(tokens, "Bearer secret-1") == "default"
    assert caplog.messages == [
        f"token file {path}: it is empty: expected a line with a token; the previous content stays in use for 300 s "
        "at most",
        f"token file {path}: line 1: after the token, expected name=…, scopes=…, requests_per_second=…, "
        "bytes_per_second=…, each once; the previous content stays in use for 300 s at most",
    ]


def test_quotas_belong_to_the_name_and_outlive_a_reload(path: Path) -> None:
    quota = "requests_per_second=1000 bytes_per_second=10M"
    path.write_text(
        f"one name=a scopes=infer {quota}\ntwo name=a scopes=admin {quota}\nthree name=b scopes=infer {quota}"
    )
    tokens = TokenFile(path, SCOPES)
    one, two, three = (tokens.find(f"Bearer {token}") for token in ("one", "two", "three"))
    assert one is not None
    assert two is not None
    assert three is not None
    assert one.quota is two.quota is not None
    assert one.quota is not three.quota
    replace(path, f"new name=a scopes=infer {quota}\nthree name=b scopes=infer requests_per_second=1")
    new, other = tokens.find("Bearer new"), tokens.find("Bearer three")
    assert new is not None
    assert new.quota is one.quota
    assert other is not None
    assert other.quota is not three.quota


def test_memory_and_logs_hold_no_token(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    token = "".join(("very-", "private-", "token"))
    path.write_text(f"{token} name=a scopes=infer")
    tokens = TokenFile(path, SCOPES)
    principal = tokens.find("Bearer " + token)
    gc.collect()
    assert token not in repr(principal) + repr(tokens) + caplog.text
    seen, waiting = set[int](), [tokens]
    while waiting:
        found = waiting.pop()
        if id(found) not in seen and not isinstance(found, type):
            seen.add(id(found))
            assert not (isinstance(found, str) and token in found)
            assert not (isinstance(found, bytes) and token.encode() in found)
            if type(found).__module__.startswith("convoy") or isinstance(found, dict | list | tuple | frozenset):
                waiting += gc.get_referents(found)


def test_an_invalid_file_is_an_error_at_the_start(path: Path) -> None:
    path.write_text("a b")
    with pytest.raises(CredentialError, match=rf"^token file {path}: line 1: after the token, expected name="):
        TokenFile(path, SCOPES)
    path.unlink()
    with pytest.raises(CredentialError, match=rf"^cannot read {path}: No such file or directory$"):
        TokenFile(path, SCOPES)


def test_a_world_readable_file_is_warned_of(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    TokenFile(path, SCOPES)
    assert caplog.messages == []
    path.chmod(0o644)
    TokenFile(path, SCOPES)
    assert "can be read by every user of this machine" in caplog.text


def test_threads_always_see_the_old_or_the_new_token(path: Path) -> None:
    tokens = TokenFile(path, SCOPES)
    failures = []

    def ask() -> None:
        for _ in range(500):
            if not (tokens.find("Bearer secret-1") or tokens.find("Bearer secret-2")):
                failures.append("neither")
                break

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    replace(path, "secret-2")
    for thread in threads:
        thread.join()
    assert failures == []


class TestOpenCalls:
    @pytest.fixture(autouse=True)
    def _look_often(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(auth, "LOOK_EVERY_S", 0.01)

    @pytest.mark.parametrize(
        "content", ["secret-2", "secret-1 name=b scopes=admin", "secret-1 name=a scopes=admin,infer", None]
    )
    def test_end_once_when_their_line_goes_or_changes(self, path: Path, content: str | None) -> None:
        path.write_text("secret-1 name=a scopes=admin")
        tokens = TokenFile(path, SCOPES)
        ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        with tokens.watch("Bearer secret-1", lambda: ended.put("a")):
            if content is None:
                path.unlink()
            else:
                replace(path, content)
            assert ended.get(timeout=20) == "a"
            time.sleep(0.05)
            assert ended.empty()

    def test_go_on_while_their_token_is_valid(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path.write_text("secret-1 name=a scopes=admin\nsecret-2 name=a scopes=admin")
        tokens = TokenFile(path, SCOPES)
        ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        with tokens.watch("Bearer secret-2", lambda: ended.put("kept")):
            with tokens.watch("Bearer secret-1", lambda: ended.put("over")):
                pass
            with (
                tokens.watch("Bearer secret-1", lambda: 1 / 0),
                tokens.watch("Bearer secret-1", lambda: ended.put("a")),
            ):
                replace(path, "secret-2 name=a scopes=admin requests_per_second=9")
                assert ended.get(timeout=20) == "a"
        time.sleep(0.05)
        assert ended.empty()
        assert "a call could not be ended" in caplog.text

    def test_leave_no_thread(self, path: Path) -> None:
        before = set(threading.enumerate())
        with TokenFile(path, SCOPES).watch("Bearer secret-1", lambda: None):
            (looking,) = set(threading.enumerate()) - before
        looking.join(20)
        assert not looking.is_alive()
