"""A tp group whose ranks are threads, for what works on vocabulary shards."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from meshlm.shardformer.shard import Range, aligned_split, even_split

T = TypeVar("T")


class FakeTp:
    """One rank's end of it."""

    def __init__(self, rank: int, parts: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(parts)
        self._parts, self._barrier = parts, barrier

    def all_gather(self, tensor: Tensor) -> Tensor:
        self._parts[self.rank] = tensor.clone()
        self._barrier.wait(20)
        shapes = {(part.shape, part.dtype) for part in self._parts}
        assert len(shapes) == 1, f"ranks bring different tensors: {shapes}"
        gathered = torch.stack(self._parts)
        self._barrier.wait(20)
        return gathered

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        return tensor.copy_(self.all_gather(tensor)[src])


def on_ranks(size: int, body: Callable[[Any], T]) -> list[T]:
    """What body(tp) gives on each rank; raises what the first that fails raises."""
    parts: list[Any] = [None] * size
    results: list[Any] = [None] * size
    errors: list[BaseException] = []
    barrier = threading.Barrier(size)

    def rank(index: int) -> None:
        try:
            results[index] = body(FakeTp(index, parts, barrier))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return results


def splits(vocab_size: int) -> list[list[Range]]:
    """Ways to divide a vocabulary."""
    return [even_split(vocab_size, parts) for parts in (1, 2, 3)] + [aligned_split(vocab_size, 2)]
