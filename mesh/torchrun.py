"""Ranks that torchrun has started: rank 0 drives. It listens on a port that the system picked, the others connect to
it, and from there on it is as with ranks of our own: a `Channel` from the driver to each rank.
"""

import os
import queue
import secrets
import socket
import struct
import sys
import threading
import time
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Pipe, answer_challenge, deliver_challenge
from typing import Any

import torch.distributed as dist

from .channel import Channel
from .launch import RankFailure, RankPlace

_LOOPBACK = "127.0.0.1"
_SILENCE_S = 60  # of another host, after which it counts as gone: one that loses its power closes no connection


def torchrun_place() -> RankPlace | None:
    """This process's place if torchrun (or a caller that set its variables, or a process group) made it a rank."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if not all(name in os.environ for name in names):
        if not dist.is_initialized():
            return None
        return RankPlace(dist.get_rank(), dist.get_world_size(), dist.get_rank(), dist.get_world_size())
    world_size = int(os.environ["WORLD_SIZE"])
    return RankPlace(
        rank=int(os.environ["RANK"]),
        world_size=world_size,
        local_rank=int(os.environ["LOCAL_RANK"]),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
    )


def connect_to_driver(place: RankPlace, timeout_s: float) -> tuple[list[Channel], Channel]:
    """Control channels between rank 0, which drives, and every rank; collective over the default process group.

    Returns (channels by rank on rank 0, empty elsewhere; this rank's own end). Rank 0 has a channel to itself.
    Raises RankFailure if a rank does not come within `timeout_s`, or cannot reach rank 0.
    """
    one_host = place.local_world_size == place.world_size
    if place.rank != 0:
        box: list[Any] = [None]
        dist.broadcast_object_list(box, src=0)
        address, key = box[0]
        return [], _accept(_reach_driver(place.rank, address, key, timeout_s), place)

    key = secrets.token_bytes(32)
    with socket.create_server((_LOOPBACK if one_host else "", 0), backlog=place.world_size) as server:
        host = _LOOPBACK if one_host else os.environ.get("MASTER_ADDR", socket.gethostname())
        dist.broadcast_object_list([((host, server.getsockname()[1]), key)], src=0)
        connections = _gather_ranks(server, key, place.world_size, timeout_s)
    ours, theirs = Pipe()
    connections[0] = ours
    channels = [Channel(connections[rank]) for rank in range(place.world_size)]
    for channel in channels:
        channel.connection.send(channel.offer())
    own = _accept(theirs, place)
    for rank, channel in enumerate(channels):
        channel.share(_answer(rank, channel.connection, timeout_s))
    return channels, own


def _accept(connection: Connection, place: RankPlace) -> Channel:
    """A rank's side of the offer to share memory; it says whether that can be."""
    channel = Channel(connection)
    connection.send(channel.accept(connection.recv(), place.is_crowded))
    return channel


def _answer(rank: int, connection: Connection, timeout_s: float) -> bool:
    try:
        if connection.poll(timeout_s):
            return bool(connection.recv())
        reason = f"has not answered within start_timeout_s={timeout_s:g}"
    except (EOFError, OSError):
        reason = "has gone"
    raise RankFailure(f"rank {rank} has connected to rank 0 and {reason}")


def _gather_ranks(server: socket.socket, key: bytes, world_size: int, timeout_s: float) -> dict[int, Connection]:
    """Rank 0's side: a connection to each other rank. Whoever else connects, and says nothing, holds up nobody."""
    found: queue.SimpleQueue[tuple[int, Connection]] = queue.SimpleQueue()
    deadline = time.monotonic() + timeout_s

    def greet(stream: socket.socket) -> None:
        connection = _as_connection(stream, timeout_s)
        try:
            deliver_challenge(connection, key)
            answer_challenge(connection, key)
            rank = connection.recv()
            _set_timeout(connection, 0)
            found.put((rank, connection))
        except (AuthenticationError, EOFError, OSError):
            connection.close()  # a stranger

    def accept() -> None:
        while not done.is_set():
            with suppress(OSError):  # its timeout
                threading.Thread(target=greet, args=(server.accept()[0],), daemon=True).start()

    server.settimeout(0.2)
    done = threading.Event()
    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    connections: dict[int, Connection] = {}
    try:
        while missing := sorted(set(range(1, world_size)) - set(connections)):
            try:
                rank, connection = found.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                for connection in connections.values():
                    connection.close()
                raise RankFailure(
                    f"ranks {missing} have not connected to rank 0 within start_timeout_s={timeout_s:g}"
                ) from None
            connections[rank] = connection
    finally:
        done.set()
        with suppress(OSError):  # not every system can
            server.shutdown(socket.SHUT_RDWR)  # wakes the thread
        accepting.join()
    return connections


def _reach_driver(rank: int, address: tuple[str, int], key: bytes, timeout_s: float) -> Connection:
    """Another rank's side."""
    try:
        connection = _as_connection(socket.create_connection(address, timeout=timeout_s), timeout_s)
        try:
            answer_challenge(connection, key)
            deliver_challenge(connection, key)
            connection.send(rank)
            _set_timeout(connection, 0)
        except BaseException:
            connection.close()
            raise
    except (AuthenticationError, EOFError, OSError) as error:
        reason = "no answer" if isinstance(error, BlockingIOError) else f"{error}" or type(error).__name__
        raise RankFailure(
            f"rank {rank} cannot reach rank 0, which drives, at {address[0]}:{address[1]} "
            f"(start_timeout_s={timeout_s:g}): {reason}"
        ) from error
    return connection


def _as_connection(stream: socket.socket, timeout_s: float) -> Connection:
    """timeout_s: for each read and write, until `_set_timeout` lifts it."""
    stream.settimeout(None)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":  # other systems wait hours
        for option, value in (
            (socket.TCP_KEEPIDLE, _SILENCE_S // 2),
            (socket.TCP_KEEPINTVL, _SILENCE_S // 6),
            (socket.TCP_KEEPCNT, 3),
            (socket.TCP_USER_TIMEOUT, 1000 * _SILENCE_S),
        ):
            stream.setsockopt(socket.IPPROTO_TCP, option, value)
    connection = Connection(stream.detach())
    _set_timeout(connection, timeout_s)
    return connection


def _set_timeout(connection: Connection, timeout_s: float) -> None:
    """A time-out of the system's, since a `Connection` has none of its own; 0 for none."""
    value = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    with socket.socket(fileno=os.dup(connection.fileno())) as stream:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
