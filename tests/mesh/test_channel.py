"""Channel and Inbox: messages through shared memory, and by the connection where there is none."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from typing import Any

import pytest

from meshlm.config.native import CompileError
from meshlm.mesh import channel as module
from meshlm.mesh.channel import Channel, Inbox

pytestmark = pytest.mark.timeout(60)
LONG = b"x" * (2 * module._LONGEST)


def pair(is_crowded: bool = False) -> tuple[Channel, Channel]:
    ours, theirs = (Channel(connection) for connection in Pipe())
    ours.share(theirs.accept(ours.offer(), is_crowded))
    return ours, theirs


@pytest.fixture(params=["shared", "crowded", "by the connection"])
def ends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Channel, Channel]]:
    def refuse() -> Any:
        raise CompileError("no C++ compiler is installed")

    if request.param == "by the connection":
        monkeypatch.setattr(module, "library", refuse)
        module._rings.cache_clear()
    ours, theirs = pair(request.param == "crowded")
    if request.param != "by the connection" and not ours.is_shared:
        pytest.skip("no C++ compiler, or no memfd")
    with ours, theirs:
        assert ours.is_shared is theirs.is_shared is (request.param != "by the connection")
        yield ours, theirs
    module._rings.cache_clear()


def in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_everything_arrives_in_order_both_ways(ends: tuple[Channel, Channel]) -> None:
    """More than a ring holds, short and long, to a reader that is now late and now asleep."""
    ours, theirs = ends
    messages = [LONG if i % 50 == 49 else b"y" * (i * 7919 % module._LONGEST) for i in range(300)]

    def echo() -> None:
        for number in range(len(messages)):
            if number % 40 == 20:
                time.sleep(0.01)
            theirs.send((number, theirs.recv()))

    def send() -> None:
        for number, message in enumerate(messages):
            if number % 40 == 0:
                time.sleep(0.005)
            ours.send(message)

    threads = [in_thread(echo), in_thread(send)]
    for number, message in enumerate(messages):
        assert ours.recv() == (number, message)
    for thread in threads:
        thread.join()
    assert not ours.poll() and not theirs.poll()


def test_nothing_is_lost_between_looking_and_falling_asleep(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends

    def echo() -> None:
        for _ in range(2000):
            theirs.send(theirs.recv())

    thread = in_thread(echo)
    inbox = Inbox([ours])
    for number in range(2000):
        ours.send(number)
        assert inbox.wait(10) == [0]
        assert ours.recv() == number
    thread.join()
    inbox.close()


def test_what_was_said_before_the_end_is_heard(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    theirs.send("last words")
    theirs.close()
    inbox = Inbox([ours])
    assert inbox.wait(10) == [0] and ours.poll() and ours.recv() == "last words"
    assert inbox.wait(10) == [0] and ours.poll()
    with pytest.raises((EOFError, OSError)):
        ours.recv()
    inbox.drop(0)
    assert inbox.wait(0.01) == []


def test_an_inbox_waits_for_any_and_no_longer_than_it_is_told() -> None:
    """Some of the channels share memory, as some ranks are on the driver's host."""
    pairs = [pair(), tuple(Channel(connection) for connection in Pipe()), pair()]
    inbox = Inbox([ours for ours, _ in pairs])
    began = time.monotonic()
    assert inbox.wait(0) == [] and inbox.wait(0.05) == []
    assert 0.04 < time.monotonic() - began < 5
    for position, (ours, theirs) in enumerate(pairs):
        timer = threading.Timer(0.05, theirs.send, [LONG])
        timer.start()
        assert inbox.wait(10) == [position] and ours.recv() == LONG
        timer.join()
        assert inbox.wait(0) == []  # whatever bells are left
    inbox.close()


def test_who_waits_sees_that_the_other_process_is_killed() -> None:
    """Asleep or not, and nothing is left."""
    ours, theirs = pair()
    pid = os.fork()
    if not pid:
        try:
            ours.close()
            theirs.recv()
            time.sleep(60)
        finally:
            os._exit(0)
    theirs.close()
    try:
        ours.send("begin")
        threading.Timer(0.1, os.kill, (pid, signal.SIGKILL)).start()
        began = time.monotonic()
        with pytest.raises((EOFError, OSError)):
            ours.recv()
        assert time.monotonic() - began < 5
        with pytest.raises(OSError):
            ours.send(LONG)
    finally:
        os.waitpid(pid, 0)
    assert not [name for name in os.listdir("/dev/shm") if "meshlm" in name]


def test_memory_of_another_host_is_not_taken_for_the_offered() -> None:
    """There /proc has another file under that number, or none."""
    ours, theirs = (Channel(connection) for connection in Pipe())
    offer = ours.offer()
    if offer is None:
        pytest.skip("no C++ compiler, or no memfd")
    path, token = offer
    assert not theirs.accept((path, token[::-1]), is_crowded=False)
    assert not theirs.accept((path + "0000", token), is_crowded=False)
    assert not theirs.accept(None, is_crowded=False)
    ours.share(False)
    ours.send("by the connection")
    assert theirs.recv() == "by the connection" and not os.path.exists(path)
