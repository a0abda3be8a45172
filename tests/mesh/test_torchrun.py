"""How ranks that torchrun started connect to the one that drives; here all of them are threads."""

import os
import re
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from meshlm.mesh.launch import RankFailure
from meshlm.mesh.torchrun import _gather_ranks, _reach_driver

KEY = bytes(range(32))
pytestmark = pytest.mark.timeout(60)


def listen() -> tuple[socket.socket, Any]:
    server = socket.create_server(("127.0.0.1", 0))
    return server, server.getsockname()


def test_strangers_hold_up_nobody() -> None:
    server, address = listen()
    with server, socket.create_connection(address), socket.create_connection(address) as rude:
        rude.sendall(b"GET / HTTP/1.1\r\n\r\n")
        started = time.monotonic()
        with ThreadPoolExecutor() as pool:
            wrong_key = pool.submit(_reach_driver, 1, address, KEY[::-1], 1.0)
            theirs = [pool.submit(_reach_driver, rank, address, KEY, 1.0) for rank in (2, 1)]
            ours = _gather_ranks(server, KEY, 3, timeout_s=1.0)
            assert time.monotonic() - started < 0.9
            with pytest.raises(RankFailure, match=r"^rank 1 cannot reach rank 0, which drives, at 127.0.0.1:\d+ "):
                wrong_key.result()
            for rank, end in zip((2, 1), theirs, strict=True):
                time.sleep(1.2 if rank == 2 else 0.0)  # the timeout is lifted once they know each other
                heard = pool.submit(ours[rank].recv)
                end.result().send(rank)
                assert heard.result() == rank
        for connection in [*ours.values(), *(end.result() for end in theirs)]:
            connection.close()


def test_a_rank_that_does_not_connect_is_named() -> None:
    server, address = listen()
    with server, ThreadPoolExecutor() as pool:
        there = pool.submit(_reach_driver, 2, address, KEY, 5.0)
        with pytest.raises(RankFailure) as failure:
            _gather_ranks(server, KEY, 4, timeout_s=0.5)
        assert str(failure.value) == "ranks [1, 3] have not connected to rank 0 within start_timeout_s=0.5"
        with there.result() as connection, pytest.raises(EOFError):
            connection.recv()


def test_a_driver_that_cannot_be_reached() -> None:
    server, address = listen()
    start = re.escape(f"rank 3 cannot reach rank 0, which drives, at 127.0.0.1:{address[1]} (start_timeout_s=0.3): ")
    with server, pytest.raises(RankFailure, match=f"^{start}no answer$"):
        _reach_driver(3, address, KEY, 0.3)
    with pytest.raises(RankFailure, match=f"^{start}.*refused$"):
        _reach_driver(3, address, KEY, 0.3)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's TCP options")
def test_a_host_that_vanishes_is_missed_within_a_minute() -> None:
    """By the system, on both ends; a cable cannot be pulled here."""
    server, address = listen()
    with server, ThreadPoolExecutor() as pool:
        reaching = pool.submit(_reach_driver, 1, address, KEY, 5.0)
        ends = [_gather_ranks(server, KEY, 2, timeout_s=5.0)[1], reaching.result()]
    for end in ends:
        with end, socket.socket(fileno=os.dup(end.fileno())) as stream:
            tcp = [
                stream.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
            ]
            assert stream.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) and tcp == [30, 10, 3, 60_000]
