"""Addresses that answer badly: what may pass is waited for, as long as the server asks; the rest is said at once."""

from __future__ import annotations

import email.utils
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmtrain.data.core import retry
from mmtrain.data.core.retry import Absent, Unreachable, pause_after, requested_pause
from mmtrain.data.images.cache import ShardCache
from mmtrain.data.images.shards import find_shards, read_classes
from tests.data.served import Server, serving

pytest.importorskip("aiohttp", reason="shards over http: pip install 'mmtrain[remote]'")

Answer = tuple[int, dict[str, str]]
BROKEN: Answer = (0, {})


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as served:
        served.content = b'{"classes": ["a", "b"]}'
        yield served


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    caller, sleep = threading.get_ident(), time.sleep

    def paused(seconds: float) -> None:
        if threading.get_ident() == caller:
            found.append(seconds)
        else:  # the server's thread waits in earnest
            sleep(seconds)

    monkeypatch.setattr(retry.time, "sleep", paused)
    return found


def answer_first(server: Server, answers: list[Answer], *, forever: bool = False) -> None:
    """The first requests get these answers; ``forever``: all others get the last of them."""

    def trick(handler: Any, number: int) -> bool:
        if number > len(answers) and not forever:
            return False
        code, headers = answers[min(number, len(answers)) - 1]
        if code:
            handler.answer(code, b"", headers)
        else:
            handler.connection.shutdown(socket.SHUT_RDWR)
        return True

    server.trick = trick


@pytest.mark.parametrize(
    ("answers", "waits"),
    [
        ([(503, {})] * 2, [1.0, 2.0]),
        ([(429, {})] * 3, [1.0, 2.0, 4.0]),
        ([(500, {}), (502, {})], [1.0, 2.0]),
        ([BROKEN, BROKEN], [1.0]),  # aiohttp itself asks again once
    ],
    ids=str,
)
def test_what_passes_is_waited_for(
    server: Server, tmp_path: Path, pauses: list[float], answers: list[Answer], waits: list[float]
) -> None:
    cache = ShardCache(tmp_path, 10**9)
    answer_first(server, answers)
    assert cache.fetch(server.url).read_bytes() == server.content
    server.asked.clear()
    assert cache.size(server.url) == len(server.content)
    server.asked.clear()
    assert read_classes(server.url) == ["a", "b"]
    assert pauses == waits * 3


def test_the_pauses_grow_and_the_server_is_heard(server: Server, tmp_path: Path, pauses: list[float]) -> None:
    answer_first(server, [(503, {}), (503, {"Retry-After": "7"}), (429, {"Retry-After": "1"})], forever=True)
    with pytest.raises(Unreachable, match=r"could not be fetched in 4 attempts \(the server answered 429 Too Many"):
        ShardCache(tmp_path, 10**9).fetch(server.url)
    assert pauses == [1.0, 7.0, 4.0]
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        ((404, {}), Absent, "there is no such file"),
        ((410, {}), Absent, "there is no such file"),
        ((403, {}), Unreachable, "the server answered 403 Forbidden"),
        ((401, {}), Unreachable, "the server answered 401 Unauthorized"),
        ((302, {"Location": "/t.csv"}), Unreachable, "too many redirects. Check the URL"),
    ],
)
def test_what_does_not_pass_is_said_at_once(
    server: Server, tmp_path: Path, pauses: list[float], answer: Answer, kind: type[Unreachable], said: str
) -> None:
    answer_first(server, [answer], forever=True)
    cache = ShardCache(tmp_path, 10**9)
    for ask in (cache.fetch, cache.size):
        with pytest.raises(kind, match=said) as caught:
            ask(server.url)
        assert str(caught.value).startswith(server.url)
        assert "FileNotFoundError" not in str(caught.value)
    if kind is Absent:
        assert read_classes(server.url) is None
    else:
        with pytest.raises(Unreachable, match=said):
            read_classes(server.url)
    assert pauses == []


def test_a_server_that_is_not_there(pauses: list[float]) -> None:
    with pytest.raises(Unreachable, match=r"in 4 attempts \(ClientConnectorError: Cannot connect.*name its shards"):
        find_shards("http://127.0.0.1:1/train")
    assert pauses == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("header", "seconds"), [(None, 0), ("", 0), ("12", 12), (" 3 ", 3), ("soon", 0), ("-5", 0), ("9" * 400, 120)]
)
def test_retry_after(header: str | None, seconds: float) -> None:
    assert pause_after(1, 0.0, requested_pause(header)) == seconds


def test_retry_after_a_date() -> None:
    assert 25 < requested_pause(email.utils.formatdate(time.time() + 30, usegmt=True)) <= 30
    assert requested_pause(email.utils.formatdate(time.time() - 30, usegmt=True)) == 0
