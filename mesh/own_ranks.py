"""Ranks of our own: child processes of the caller's, which drives and is no rank.

A fresh interpreter (not a fork of the caller's, and so without a ``__main__`` guard) imports what ranks need, once,
forks each of them and ends; they become the driver's children (`subreaper`). Each has two descriptors: its end of the
control connection, and the reading end of a pipe of which only the driver holds the writing end. When that pipe ends,
or the parent changes, the driver is gone, however it went, and the rank exits. Ranks meet at a store that the driver
serves on a port that the system picked.
"""

import atexit
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any, NoReturn

import torch.distributed as dist

from .interrupts import uninterrupted
from .launch import Failure, RankFailure, RankPlace, available_cores, divide_threads
from .subreaper import can_reap_grandchildren, subreaper

_LOOPBACK = "127.0.0.1"
_REAP_S = 0.005  # between two looks whether a rank has ended
_POLL_S = 1.0  # how often a rank looks whether its parent is still the same


class RankProcesses:
    """Processes that run ``target(connection, place, store)``, one for each rank.

    target: "module:function", which returns the process's exit code. `connections[rank]` is the driver's end of each
    control connection.
    fork: whether the ranks are forks of one process that has imported `target`; else each is a fresh interpreter.
    """

    def __init__(self, world_size: int, target: str, name_rank: Callable[[int], str], fork: bool = True) -> None:
        self.name_rank = name_rank
        self._pid = os.getpid()
        self.connections: list[Connection] = []
        self._processes: list[_Rank] = []
        self._last_words: list[deque[str]] = []
        self._relays: list[threading.Thread] = []
        # Its port is the system's choice, taken the moment it is known: no other process can get in between. And it
        # listens where only this host can reach it, while a store that opens its port itself listens everywhere.
        server = socket.create_server((_LOOPBACK, 0))
        self._store: dist.TCPStore | None = dist.TCPStore(
            _LOOPBACK,
            server.getsockname()[1],
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=server.detach(),  # the store closes it
        )
        lifeline, self._lifeline = os.pipe()
        places = [RankPlace(rank, world_size, rank, world_size) for rank in range(world_size)]
        together = fork and can_reap_grandchildren()
        try:
            with uninterrupted():  # a Ctrl-C amid the start of a process would leave one that nobody knows
                for some in [places] if together else [[place] for place in places]:
                    self._start(some, target, lifeline)
                atexit.register(self.close)
        except BaseException:
            self.close(grace_s=0)
            raise
        finally:
            os.close(lifeline)

    def _start(self, places: Sequence[RankPlace], target: str, lifeline: int) -> None:
        """A process that becomes the one rank, or forks them all."""
        assert self._store is not None
        pipes = [Pipe() for _ in places]
        outputs = [os.pipe() for _ in places]
        told, tells = os.pipe()
        theirs = [connection.fileno() for _, connection in pipes]
        argument = {
            "path": sys.path,
            "target": target,
            "connections": theirs,
            "outputs": [written for _, written in outputs],
            "pids": tells,
            "lifeline": lifeline,
            "parent": os.getpid(),
            "port": self._store.port,
            "places": [asdict(place) for place in places],
        }
        boot = "import json, sys; a = json.loads(sys.argv[1]); sys.path[:] = a['path']; " + (
            f"from {__name__} import run_ranks; run_ranks(a)"
        )
        threads = str(max(1, available_cores() // places[0].local_world_size))
        environment = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
        environment |= {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
        try:
            starter = _Starter(
                [sys.executable, "-c", boot, json.dumps(argument)],
                environment,
                outputs[0][1],
                (*theirs, *(written for _, written in outputs), tells, lifeline),
                told,
                len(places),
            )
        except BaseException:
            for read, _ in outputs:
                os.close(read)
            raise
        finally:
            os.close(tells)
            for (_, connection), (_, written) in zip(pipes, outputs, strict=True):
                connection.close()
                os.close(written)
        for index, place in enumerate(places):
            words: deque[str] = deque(maxlen=60)
            relay = threading.Thread(target=self._relay, args=(outputs[index][0], place.rank, words), daemon=True)
            relay.start()
            self.connections.append(pipes[index][0])
            self._processes.append(_Rank(starter, index))
            self._last_words.append(words)
            self._relays.append(relay)

    def _relay(self, output: int, rank: int, words: deque[str]) -> None:
        """Passes a rank's output on to stderr, line by line, and remembers the last of it."""
        with open(output, "rb") as lines:
            for line in lines:
                text = line.decode(errors="replace").rstrip("\n")
                words.append(text)
                print(f"[rank {rank}] {text}", file=sys.stderr, flush=True)

    def failure(self, rank: int, said: str = "") -> RankFailure:
        """What to raise for a rank that has gone, or has said that it failed (`said`: its traceback)."""
        code = self._processes[rank].wait(2.0)
        if code is not None:
            self._relays[rank].join(1.0)
        how = "is still running" if code is None else f"exit code {code}" + _signal_name(code)
        words = said.strip() or "\n".join(self._last_words[rank] or self._last_words[0])
        return RankFailure(f"{self.name_rank(rank)} failed: {how}" + (f"; its last output:\n{words}" if words else ""))

    def close(self, grace_s: float = 5.0) -> None:
        """Ends every rank and waits until it has ended; can be called twice. Does nothing in a fork of the driver."""
        if os.getpid() != self._pid:
            return
        atexit.unregister(self.close)
        for connection in self.connections:
            connection.close()
        if self._lifeline >= 0:
            os.close(self._lifeline)  # a rank that is not waiting for its driver's word sees this
            self._lifeline = -1
        deadline = time.monotonic() + grace_s
        for process in self._processes:
            if process.wait(max(0.0, deadline - time.monotonic())) is None:
                process.kill()
                process.wait(None)
        for relay in self._relays:
            relay.join(1.0)
        self._store = None  # closes its port


class _Starter:
    """The process that becomes a rank, or forks several and ends."""

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        output: int,
        descriptors: Sequence[int],
        told: int,
        num_ranks: int,
    ) -> None:
        self._lock = threading.Lock()
        self._pids: dict[int, int] = {}  # of ranks that it has forked
        self._codes: dict[int, int] = {}  # of ranks that have ended
        self._has_ended = threading.Event()  # and its ranks are our children
        if forks := num_ranks > 1:
            subreaper.want()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=descriptors,
                process_group=0,  # Ctrl-C reaches the driver alone
            )
        except BaseException:
            os.close(told)
            if forks:
                subreaper.unwant()
            raise
        threading.Thread(target=self._adopt, args=(told, forks), daemon=True).start()

    def _adopt(self, told: int, forks: bool) -> None:
        """Waits until the process has ended, and takes over whom it leaves."""
        self._process.wait()
        with open(told) as pids:
            self._pids = dict(enumerate(map(int, pids)))
        if forks:
            subreaper.unwant()
        self._has_ended.set()

    def wait(self, index: int, timeout_s: float | None) -> int | None:
        """A rank's exit code; None if it has none by then. Of one that was never forked it is this process's."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if not self._has_ended.wait(timeout_s):
            return None
        while (code := self._code(index)) is None and (deadline is None or time.monotonic() < deadline):
            time.sleep(_REAP_S)
        return code

    def _code(self, index: int) -> int | None:
        with self._lock:
            if index not in self._pids:
                return self._process.returncode
            if index not in self._codes:
                try:
                    ended, status = os.waitpid(self._pids[index], os.WNOHANG)
                except ChildProcessError:  # somebody else has reaped it
                    ended, status = self._pids[index], 0
                if ended:
                    self._codes[index] = os.waitstatus_to_exitcode(status)
            return self._codes.get(index)

    def kill(self, index: int) -> None:
        """The rank; or this process, if it has not come to fork all of them."""
        if not self._has_ended.is_set():
            self._process.kill()
            self._has_ended.wait()
        if self._code(index) is None:
            os.kill(self._pids[index], signal.SIGKILL)


@dataclass(frozen=True)
class _Rank:
    """A rank's process."""

    starter: _Starter
    index: int  # among those that it starts

    def wait(self, timeout_s: float | None) -> int | None:
        """Its exit code; None if it has not ended by then."""
        return self.starter.wait(self.index, timeout_s)

    def kill(self) -> None:
        self.starter.kill(self.index)


def _signal_name(code: int) -> str:
    if code >= 0:
        return ""
    try:
        return f" ({signal.Signals(-code).name})"
    except ValueError:
        return ""


# ---- the rank's side ---------------------------------------------------------------------------------------------


def run_ranks(argument: dict[str, Any]) -> None:
    """The life of a process that is one rank, or imports what ranks need and forks several."""
    import faulthandler

    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    places = [RankPlace(**place) for place in argument["places"]]
    if len(places) == 1:
        _run_rank(argument, 0, places[0])
    importlib.import_module(argument["target"].split(":")[0])
    gc.freeze()  # what is there already is not looked at again, and so stays shared
    for index, place in enumerate(places):
        pid = os.fork()
        if not pid:
            _run_rank(argument, index, place)
        os.write(argument["pids"], f"{pid}\n".encode())
    os._exit(0)


def _run_rank(argument: dict[str, Any], index: int, place: RankPlace) -> NoReturn:
    """The whole life of a rank."""
    if len(argument["places"]) > 1:
        os.setpgid(0, 0)
    output = argument["outputs"][index]
    os.dup2(output, 1)
    os.dup2(output, 2)
    others = {*argument["connections"], *argument["outputs"], argument["pids"]} - {argument["connections"][index]}
    for descriptor in others:
        os.close(descriptor)
    parents = {argument["parent"], os.getppid()}  # who has forked this process ends at once
    watch = threading.Thread(target=_exit_with_driver, args=(argument["lifeline"], parents), daemon=True)
    watch.start()
    divide_threads(place.local_world_size)
    module, function = argument["target"].split(":")
    code = 0
    with Connection(argument["connections"][index]) as connection:
        try:
            store = dist.TCPStore(_LOOPBACK, argument["port"], is_master=False)
            code = getattr(importlib.import_module(module), function)(connection, place, store)
        except Exception as error:
            code = 1
            with suppress(OSError):
                connection.send(Failure.of(error))
    sys.stdout.flush()
    os._exit(code)  # at once: a process group whose peers are gone can hold up an orderly exit


def _exit_with_driver(lifeline: int, parents: set[int]) -> None:
    """Ends this process when the driver's end of the lifeline closes, or its parent is none of these."""
    import select

    while os.getppid() in parents:
        if select.select([lifeline], [], [], _POLL_S)[0]:
            break
    time.sleep(0.5 * _POLL_S)  # the driver may have said goodbye: let the rank leave by itself
    os._exit(1)
