"""Collectives on a process group as a named object, held by the module that communicates.

A group of size 1 is a no-op here, and nowhere else in the project.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from .process_group_mesh import Axes, CollectiveError, ProcessGroupMesh
from .shared_memory import Recorder, SharedMemory, SharedMemoryError

T = TypeVar("T")
ReduceOp = Literal["sum", "max", "min"]

# torch 2.13 renamed the one and deprecated the other.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Pending:
    """A send or receive under way; keeps its tensor alive until it is done."""

    __slots__ = ("_communicator", "_operation", "_tensor", "_work")

    def __init__(self, communicator: "Communicator", operation: str, tensor: torch.Tensor, work: dist.Work) -> None:
        self._communicator = communicator
        self._operation = operation
        self._tensor = tensor
        self._work: dist.Work | None = work

    def wait(self) -> torch.Tensor:
        """Wait until the tensor has left or arrived (on CUDA: for the current stream), and return it."""
        if self._work is not None:
            try:
                self._work.wait()
            except Exception as error:
                raise self._communicator._error(self._operation, self._tensor, error) from error
            self._work = None
        return self._tensor


class Communicator:
    """A process group with a name; `rank`, `src` and `dst` are positions in it, `ranks` its global ranks.

    `group` is None for a group of this rank alone. A group's timeout is fixed when it is created: `timeout_s` is
    for the error messages. Gloo reduces bfloat16 and float16 in their own precision, rounding after each addition;
    every rank gets bitwise the same result.
    """

    in_graphs = True  # whether a CUDA graph can record what it does

    def __init__(self, group: dist.ProcessGroup | None, name: str, timeout_s: float | None = None) -> None:
        self.name = name
        self.timeout_s = timeout_s
        global_rank = dist.get_rank() if dist.is_initialized() else 0
        self.ranks = (global_rank,) if group is None else tuple(dist.get_process_group_ranks(group))
        self.rank = self.ranks.index(global_rank)
        self.size = len(self.ranks)
        self.bound = "nothing" if group is None else dist.get_backend(group)  # what it communicates by
        self.on_tape = group is None
        self._group: Any = group  # called directly, which spares the checks and logging of torch.distributed's wrappers
        self._reduce_options = {
            "sum": _reduce_options(dist.ReduceOp.SUM),
            "max": _reduce_options(dist.ReduceOp.MAX),
            "min": _reduce_options(dist.ReduceOp.MIN),
        }

    def record_on(self, tape: Recorder | None) -> None:
        """From here on the tape is given what each collective of the group does, to be done again on the same tensors;
        None: no longer."""
        assert self.on_tape

    @classmethod
    def along(cls, mesh: ProcessGroupMesh, axis: Axes, backend: str | None = None) -> "Communicator":
        """The communicator of this rank along an axis or axes of the mesh; collective when the group is new."""
        line = mesh[axis]
        group = mesh.get_group(axis, backend) if line.size() > 1 else None
        name = "×".join(line.axis_names)
        if mesh.staged:
            return StagedCommunicator(group, name, mesh.timeout_s)
        shared = mesh.shared_memory(axis, backend)
        if isinstance(shared, SharedMemory):
            return SharedCommunicator(group, name, mesh.timeout_s, shared)
        communicator = cls(group, name, mesh.timeout_s)
        if communicator.bound == "gloo":
            communicator.bound += f" (not shared memory: {shared})"
        return communicator

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> torch.Tensor:
        """Reduce a tensor over the group, in place, and return it."""
        if self.size == 1:
            return tensor
        if not tensor.is_contiguous():  # gloo would reduce a strided tensor wrongly, in silence
            return tensor.copy_(self.all_reduce(tensor.contiguous(), op))
        try:
            self._group.allreduce([tensor], self._reduce_options[op]).wait()
        except Exception as error:
            raise self._error(f"all_reduce({op})", tensor, error) from error
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[*shape] from each rank, of equal shapes, to [size, *shape] by position."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        gathered = tensor.new_empty((self.size, *tensor.shape))
        try:
            # Flat, because gloo concatenates and does not stack.
            _all_gather_single(gathered.view(-1), tensor.reshape(-1), group=self._group)
        except Exception as error:
            raise self._error("all_gather", tensor, error) from error
        return gathered

    def broadcast(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        """Overwrite a tensor with that of position `src`, and return it."""
        if self.size == 1:
            return tensor
        if not tensor.is_contiguous():
            return tensor.copy_(self.broadcast(tensor.contiguous(), src))
        try:
            self._group.broadcast(tensor, src).wait()
        except Exception as error:
            raise self._error(f"broadcast from position {src}", tensor, error) from error
        return tensor

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        """Send a tensor to position `dst`; it knows its shape and dtype and receives."""
        self.isend(tensor, dst).wait()

    def recv(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        """Fill a contiguous tensor with the next one from position `src`, and return it."""
        return self.irecv(tensor, src).wait()

    def isend(self, tensor: torch.Tensor, dst: int) -> Pending:
        """Start to send; tensors to the same position arrive in the order sent. Leave it unchanged until `wait`."""
        self._check_peer(dst)
        tensor = tensor.contiguous()
        try:
            work = self._group.send([tensor], dst, 0)
        except Exception as error:
            raise self._error(f"send to position {dst}", tensor, error) from error
        return Pending(self, f"send to position {dst}", tensor, work)

    def irecv(self, tensor: torch.Tensor, src: int) -> Pending:
        """Start to receive into a contiguous tensor; it is filled once `wait` returns it."""
        self._check_peer(src)
        try:
            work = self._group.recv([tensor], src, 0)
        except Exception as error:
            raise self._error(f"receive from position {src}", tensor, error) from error
        return Pending(self, f"receive from position {src}", tensor, work)

    def all_gather_object(self, obj: T) -> list[T]:
        """Each rank's picklable object, by position."""
        if self.size == 1:
            return [obj]
        gathered: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(gathered, obj, group=self._group)
        except Exception as error:
            raise self._error("all_gather_object", None, error) from error
        return gathered

    def broadcast_object(self, obj: T, src: int) -> T:
        """The picklable object of position `src`; the others' is ignored."""
        if self.size == 1:
            return obj
        box = [obj]
        try:
            dist.broadcast_object_list(box, src=self.ranks[src], group=self._group)
        except Exception as error:
            raise self._error(f"broadcast_object from position {src}", None, error) from error
        return box[0]

    def barrier(self) -> None:
        """Return once every rank of the group has come here."""
        if self.size == 1:
            return
        try:
            dist.barrier(group=self._group)
        except Exception as error:
            raise self._error("barrier", None, error) from error

    def __repr__(self) -> str:
        return f"Communicator({self.name}, position {self.rank} of ranks {list(self.ranks)})"

    def _check_peer(self, position: int) -> None:
        if position == self.rank or not 0 <= position < self.size:
            raise ValueError(
                f"group {self.name!r} has no peer at position {position}: it has {self.size} ranks, "
                f"and this one is at position {self.rank}"
            )

    def _error(self, operation: str, tensor: torch.Tensor | None, cause: Exception) -> CollectiveError:
        parts = [f"ranks {list(self.ranks)}"]
        if tensor is not None:
            parts.append(f"tensor {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")
        if self.timeout_s is not None:
            parts.append(f"timeout {self.timeout_s:g} s")
        reason = f"{type(cause).__name__}: {cause}".partition("\n")[0]
        where = f"group {self.name!r} at rank {self.ranks[self.rank]}"
        return CollectiveError(f"{operation} failed on {where} ({', '.join(parts)}): {reason}")


class SharedCommunicator(Communicator):
    """Among ranks of one host, on the CPU: through memory that they share. Objects still go by gloo, and so do tensors
    without data (`meta`), which nobody is to read.

    A sum is rounded once, to the tensor's own precision.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, name: str, timeout_s: float | None, shared: SharedMemory
    ) -> None:
        super().__init__(group, name, timeout_s)
        self.bound, self.on_tape = "shared memory", True
        self._shared = shared
        self._receives: list[deque[SharedReceive]] = [deque() for _ in self.ranks]  # begun, not done, by peer

    def record_on(self, tape: Recorder | None) -> None:
        self._shared.tape = tape  # the group's, whoever else has a communicator of it

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> torch.Tensor:
        if not tensor.is_cpu or not tensor.is_contiguous() or not self._shared.reduces(tensor.dtype):
            return super().all_reduce(tensor, op)
        operation = f"all_reduce({op})"
        if self._shared.tape is not None:
            like = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")  # its memory is the tape's to give away
            failed = partial(self._do, operation, like, self._shared.fail)
            self._shared.record_all_reduce(self._shared.tape, tensor, op, failed)
        self._do(operation, tensor, self._shared.all_reduce, tensor, op)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_cpu:
            return super().all_gather(tensor)
        tensor, gathered = tensor.contiguous(), tensor.new_empty((self.size, *tensor.shape))
        self._collective("all_gather", tensor, self._shared.all_gather, tensor, gathered)
        return gathered

    def broadcast(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        if not tensor.is_cpu or not tensor.is_contiguous():
            return super().broadcast(tensor, src)
        self._collective(f"broadcast from position {src}", tensor, self._shared.broadcast, tensor, src)
        return tensor

    def isend(self, tensor: torch.Tensor, dst: int) -> Pending:
        self._check_peer(dst)
        self._do(f"send to position {dst}", tensor, self._shared.send, tensor.contiguous(), dst)
        return Done(tensor)

    def irecv(self, tensor: torch.Tensor, src: int) -> Pending:
        self._check_peer(src)
        assert tensor.is_contiguous()
        receive = SharedReceive(self, tensor, src)
        self._receives[src].append(receive)
        return receive

    def _receive_until(self, receive: "SharedReceive") -> None:
        """Those that were begun before come first."""
        while not receive.is_done:
            first, src = self._receives[receive.src].popleft(), receive.src
            self._do(f"receive from position {src}", first.tensor, self._shared.receive, first.tensor, src)
            first.is_done = True

    def barrier(self) -> None:
        self._collective("barrier", None, self._shared.barrier)

    def _collective(
        self, operation: str, tensor: torch.Tensor | None, function: Callable[..., None], *arguments: Any
    ) -> None:
        if self._shared.tape is not None:
            self._shared.tape.do(partial(self._do, operation, tensor, function, *arguments))
        self._do(operation, tensor, function, *arguments)

    def _do(self, operation: str, tensor: torch.Tensor | None, function: Callable[..., None], *arguments: Any) -> None:
        try:
            function(*arguments)
        except SharedMemoryError as error:
            raise self._error(operation, tensor, error) from error


class Done(Pending):
    """What was done at once."""

    __slots__ = ()

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._work = tensor, None


class SharedReceive(Pending):
    """A receive that happens when it is waited for."""

    __slots__ = ("_owner", "is_done", "src", "tensor")

    def __init__(self, owner: SharedCommunicator, tensor: torch.Tensor, src: int) -> None:
        self._owner, self.tensor, self.src = owner, tensor, src
        self.is_done = False

    def wait(self) -> torch.Tensor:
        self._owner._receive_until(self)
        return self.tensor


class StagedCommunicator(Communicator):
    """Moves every tensor as a copy on the CPU: gloo for tensors of a GPU, which it takes in some operations only.

    For tests with several ranks on one GPU, which NCCL refuses; slow, since each copy waits for the GPU.
    """

    in_graphs = False

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> torch.Tensor:
        return tensor if self.size == 1 else tensor.copy_(super().all_reduce(_staged(tensor), op))

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.size == 1:
            return super().all_gather(tensor)
        return super().all_gather(_staged(tensor)).to(tensor.device)

    def broadcast(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        return tensor if self.size == 1 else tensor.copy_(super().broadcast(_staged(tensor), src))

    def isend(self, tensor: torch.Tensor, dst: int) -> Pending:
        return super().isend(_staged(tensor), dst)

    def irecv(self, tensor: torch.Tensor, src: int) -> Pending:
        copy = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
        return StagedReceive(super().irecv(copy, src), tensor)


class StagedReceive(Pending):
    """A receive into a copy on the CPU, under way."""

    __slots__ = ("_copy", "_destination")

    def __init__(self, copy: Pending, destination: torch.Tensor) -> None:
        self._copy, self._destination = copy, destination

    def wait(self) -> torch.Tensor:
        return self._destination.copy_(self._copy.wait())


def _staged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu", copy=True)


def _reduce_options(op: Any) -> dist.AllreduceOptions:
    options = dist.AllreduceOptions()
    options.reduceOp = op
    options.asyncOp = False
    return options
