"""Who holds which block of the KV cache, and which blocks hold a known prefix: plain Python, no torch.

A block is in one of three states:

    held     reference count >= 1: in the tables of that many sequences, which have a prefix in common; one that is
             not full is copied before one of several writes to it
    cached   reference count 0, full, its content known: a later request with the same prefix may take it again
    free     reference count 0, content of no use

The free list holds the last two, in the order in which they will be taken: free ones first, then cached ones, the
least recently used first. A sequence gives its blocks back last block first, so that a prefix outlives its endings.

A full block's content is known by its node: (node of the block before it, its tokens) -> node, a new number for each
entry. Equal nodes therefore mean equal tokens from the start on; there is no hash that could collide.
"""

from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Seq

from .sequence import Sequence

_ROOT = 0  # the node before the first block

_Key = tuple[int, tuple[int, ...]]


class BlockManager:
    """Reference-counted blocks with prefix reuse. `num_blocks` and `block_size` (tokens a block) are fixed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._references = [0] * num_blocks
        self._keys: list[_Key | None] = [None] * num_blocks  # of blocks whose content is known
        self._nodes: dict[_Key, tuple[int, int]] = {}  # key -> (node, block)
        self._next_node = _ROOT + 1
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, cached ones included."""
        return len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match(self, token_ids: Seq[int]) -> list[int]:
        """The blocks that hold the longest known prefix, at least one token short of all: it takes one to go on."""
        blocks: list[int] = []
        if not self.enable_prefix_caching:
            return blocks
        node, size = _ROOT, self.block_size
        for start in range(0, len(token_ids) - size, size):
            entry = self._nodes.get((node, tuple(token_ids[start : start + size])))
            if entry is None:
                break
            node, block = entry
            blocks.append(block)
        return blocks

    def can_admit(self, sequence: Sequence, prefix: Seq[int], spare: int = 0) -> bool:
        """Whether all of a waiting sequence's tokens find room, with `spare` blocks left over.

        `prefix` is what `match` gave for the sequence.
        """
        wanted = self.num_blocks_for(sequence.num_tokens) - len(prefix)
        free = len(self._free) - sum(self._references[block] == 0 for block in prefix)
        return wanted + spare <= free

    def admit(self, sequence: Sequence, prefix: Seq[int]) -> None:
        """Gives a waiting sequence the blocks of its prefix."""
        assert not sequence.block_table
        for block in prefix:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1
            key = self._keys[block]
            assert key is not None
            sequence.block_table.append(block)
            sequence.block_nodes.append(self._nodes[key][0])
        sequence.num_computed_tokens = len(prefix) * self.block_size

    def can_extend(self, sequence: Sequence, num_tokens: int, spare: int = 0) -> bool:
        """Whether there is room for so many tokens; if that takes blocks, with `spare` blocks left over."""
        if self._has_room(sequence, num_tokens):
            return True
        wanted = self.num_blocks_for(num_tokens) - len(sequence.block_table) + self._writes_shared(sequence)
        return wanted + spare <= len(self._free)

    def extend(self, sequence: Sequence, num_tokens: int) -> tuple[int, int] | None:
        """Appends blocks until the table has room for `num_tokens`, of which those that are not scheduled yet will be
        written; (from, to) if for that a block must be copied that others hold too."""
        copy = None
        if self._has_room(sequence, num_tokens):
            return copy
        if self._writes_shared(sequence):
            place = sequence.num_scheduled_tokens // self.block_size
            shared = sequence.block_table[place]
            sequence.block_table[place] = own = self._take()
            self._references[shared] -= 1
            copy = (shared, own)
        for _ in range(self.num_blocks_for(num_tokens) - len(sequence.block_table)):
            sequence.block_table.append(self._take())
        return copy

    def _has_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether it takes no block, as in most steps."""
        return num_tokens <= len(sequence.block_table) * self.block_size and not self._writes_shared(sequence)

    def _writes_shared(self, sequence: Sequence) -> bool:
        """Whether the block of the next token to be written is held by others too: then it is part full, of a fork."""
        place = sequence.num_scheduled_tokens // self.block_size
        return place < len(sequence.block_table) and self._references[sequence.block_table[place]] > 1

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._references[block] = 1
        return block

    def fork(self, sequence: Sequence, other: Sequence) -> None:
        """Lets another sequence, which begins with the same tokens, hold the blocks of those that are computed."""
        assert not other.block_table
        other.num_computed_tokens = num_tokens = sequence.num_computed_tokens
        other.block_table += sequence.block_table[: self.num_blocks_for(num_tokens)]
        other.block_nodes += sequence.block_nodes[: num_tokens // self.block_size]
        for block in other.block_table:
            self._references[block] += 1

    def commit(self, sequence: Sequence) -> None:
        """Makes the sequence's blocks known that are full of its own tokens, computed or in a step, so that others can
        match them.

        Whoever does reads a block when it is written: steps are computed in their order on every rank, and a layer
        stores all keys and values of a step before it attends. A sequence keeps its blocks until its step is back.
        """
        if not self.enable_prefix_caching:
            return
        nodes, size = sequence.block_nodes, self.block_size
        num_settled = sequence.num_scheduled_tokens - len(sequence.drafts)
        if num_settled < (len(nodes) + 1) * size:
            return  # as in most steps
        for index in range(len(nodes), min(num_settled, sequence.num_tokens) // size):
            tokens = tuple(sequence.token_ids[index * size : (index + 1) * size])
            key = (nodes[-1] if nodes else _ROOT, tokens)
            if key not in self._nodes:  # else another block holds the same already, and this one stays anonymous
                block = sequence.block_table[index]
                self._nodes[key] = (self._next_node, block)
                self._keys[block] = key
                self._next_node += 1
            nodes.append(self._nodes[key][0])

    def free(self, sequence: Sequence) -> None:
        """Takes all blocks back from a sequence."""
        for block in reversed(sequence.block_table):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._keys[block] is None:
                    self._free.move_to_end(block, last=False)
        sequence.block_table.clear()
        sequence.block_nodes.clear()
        sequence.num_computed_tokens = 0

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._nodes[key]
            self._keys[block] = None

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Proves that no block is lost or held twice, given all sequences that may hold some. Else AssertionError."""
        counts = [0] * self.num_blocks
        for sequence in sequences:
            assert len(set(sequence.block_table)) == len(sequence.block_table), f"{sequence.request_id} repeats a block"
            assert len(sequence.block_nodes) <= len(sequence.block_table)
            for block in sequence.block_table:
                counts[block] += 1
        assert counts == self._references, "reference counts differ from the tables"
        free = set(self._free)
        assert free == {block for block, count in enumerate(counts) if count == 0}, "free list is not what is unheld"
        known = {block: key for block, key in enumerate(self._keys) if key is not None}
        assert known == {block: key for key, (_, block) in self._nodes.items()}, "nodes and keys differ"
