"""The block manager on exact block ids."""

import pytest

from meshlm.engine.block_manager import BlockManager
from meshlm.engine.sequence import Sequence


def make(tokens: list[int], name: str = "s") -> Sequence:
    return Sequence(name, list(tokens), max_tokens=100)


def admit_and_compute(blocks: BlockManager, sequence: Sequence) -> None:
    """As the scheduler does it when one step takes all of a sequence's tokens."""
    prefix = blocks.match(sequence.token_ids)
    assert blocks.can_admit(sequence, prefix)
    blocks.admit(sequence, prefix)
    blocks.extend(sequence, sequence.num_tokens)
    sequence.num_computed_tokens = sequence.num_tokens
    blocks.commit(sequence)


def free_order(blocks: BlockManager) -> list[int]:
    """The order in which blocks will be taken."""
    probe = make([0] * (blocks.num_free_blocks * blocks.block_size), "probe")
    blocks.extend(probe, probe.num_tokens)
    return list(probe.block_table)


def test_a_prefix_is_taken_block_by_block() -> None:
    blocks = BlockManager(10, 4)
    first = make(range(10), "first")
    admit_and_compute(blocks, first)
    assert first.block_table == [0, 1, 2]
    assert blocks.match([*range(8), 99]) == [0, 1]
    assert blocks.match([*range(7), 99, 8]) == [0]
    assert blocks.match([99, *range(1, 8)]) == []
    assert blocks.match([*range(4, 8), 99]) == []  # the same block content, but not after the same beginning

    second = make([*range(8), 50, 51], "second")
    admit_and_compute(blocks, second)
    assert second.block_table == [0, 1, 3]
    assert blocks.num_free_blocks == 6
    blocks.check([first, second])
    with pytest.raises(AssertionError, match="reference counts"):
        blocks.check([first])


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_the_last_token_is_never_matched(block_size: int) -> None:
    blocks = BlockManager(16, block_size)
    first = make(range(8))
    admit_and_compute(blocks, first)
    same = blocks.match(range(8))
    assert len(same) * block_size == 8 - block_size, "a whole match would leave nothing to compute"
    assert len(blocks.match(range(9))) * block_size == 8
    assert len(blocks.match([*range(8), 99, 98])) * block_size == 8


def test_a_partly_filled_block_is_not_shared() -> None:
    blocks = BlockManager(4, 4)
    first = make(range(7))
    admit_and_compute(blocks, first)
    assert blocks.match([*range(7), 9, 9, 9]) == [0]
    first.token_ids.append(7)
    assert blocks.match([*range(8), 9]) == [0], "the eighth token is known but not computed"
    first.num_computed_tokens = 8
    blocks.commit(first)
    assert blocks.match([*range(8), 9]) == [0, 1]


def test_generated_tokens_are_cached_too() -> None:
    blocks = BlockManager(4, 2)
    first = make([1, 2, 3])
    admit_and_compute(blocks, first)
    first.token_ids += [4, 5]
    blocks.extend(first, 5)
    first.num_computed_tokens = 5
    blocks.commit(first)
    assert blocks.match([1, 2, 3, 4, 5]) == [0, 1]


def test_freed_blocks_go_in_the_order_anonymous_then_least_recent() -> None:
    blocks = BlockManager(7, 2)
    early, late = make([1, 2, 3, 4, 5], "early"), make([6, 7, 8, 9], "late")
    admit_and_compute(blocks, early)  # 0, 1 known; 2 half full
    admit_and_compute(blocks, late)  # 3, 4 known
    blocks.free(early)
    blocks.free(late)
    assert early.block_table == [] and early.num_computed_tokens == 0
    assert blocks.num_free_blocks == 7
    # 2 was of no use; 5 and 6 were never taken; then early's and late's, each from its end.
    assert free_order(blocks) == [2, 5, 6, 1, 0, 4, 3]


def test_taking_a_cached_block_again_makes_it_recent() -> None:
    blocks = BlockManager(4, 2)
    for name, tokens in (("a", [1, 2, 9]), ("b", [3, 4, 9])):
        sequence = make(tokens, name)
        admit_and_compute(blocks, sequence)
        blocks.free(sequence)
    # Cached: block 0 holds [1, 2], and block 1, taken for a's third token and freed, now holds b's [3, 4].
    assert blocks.match([1, 2, 9]) == [0] and blocks.match([3, 4, 9]) == [1]
    again = make([1, 2, 8], "again")
    admit_and_compute(blocks, again)
    assert again.block_table[0] == 0
    blocks.free(again)
    assert free_order(blocks)[-2:] == [1, 0], "the block that was used last is evicted last"


def test_a_block_that_is_taken_is_forgotten() -> None:
    blocks = BlockManager(2, 2)
    first = make([1, 2, 3, 4])
    admit_and_compute(blocks, first)
    blocks.free(first)
    assert blocks.match([1, 2, 3, 4, 5]) == [0, 1]
    other = make([7, 7], "other")
    admit_and_compute(blocks, other)
    assert other.block_table == [1], "the end of the prefix goes first"
    assert blocks.match([1, 2, 3, 4, 5]) == [0]
    blocks.check([other])


def test_a_lost_beginning_hides_what_follows_it() -> None:
    blocks = BlockManager(3, 2)
    first = make([1, 2, 3, 4, 5])
    admit_and_compute(blocks, first)
    holder = make([1, 2, 3, 4, 6], "holder")
    prefix = blocks.match(holder.token_ids)
    assert prefix == [0, 1]
    blocks.free(first)
    blocks.admit(holder, prefix)
    blocks.check([holder])
    blocks.free(holder)
    taker = make([9, 9, 9, 9], "taker")
    admit_and_compute(blocks, taker)
    assert taker.block_table == [2, 1]
    blocks.free(taker)
    assert blocks.match([1, 2, 3, 4, 5]) == [0]
    # [3, 4] computed again after [1, 2] is found again, under a new block.
    again = make([1, 2, 3, 4, 5], "again")
    admit_and_compute(blocks, again)
    assert again.block_table[0] == 0
    assert blocks.match([1, 2, 3, 4, 5]) == again.block_table[:2]


def test_equal_blocks_computed_side_by_side_are_known_once() -> None:
    blocks = BlockManager(8, 2)
    twins = [make([1, 2, 3, 4], name) for name in "ab"]
    for twin in twins:  # both admitted before either is computed
        blocks.admit(twin, blocks.match(twin.token_ids))
        blocks.extend(twin, 4)
    for twin in twins:
        twin.num_computed_tokens = 4
        blocks.commit(twin)
    assert [twin.block_table for twin in twins] == [[0, 1], [2, 3]]
    assert blocks.match([1, 2, 3, 4, 5]) == [0, 1]
    blocks.check(twins)
    # What follows the anonymous copy is found by way of the known one.
    twins[1].token_ids += [5, 6]
    blocks.extend(twins[1], 6)
    twins[1].num_computed_tokens = 6
    blocks.commit(twins[1])
    assert blocks.match([1, 2, 3, 4, 5, 6, 7]) == [0, 1, 4]
    blocks.free(twins[1])
    assert free_order(blocks)[:2] == [2, 3], "the anonymous copies are of no use to anybody"


def test_without_prefix_caching_nothing_is_known() -> None:
    blocks = BlockManager(6, 2, enable_prefix_caching=False)
    first = make([1, 2, 3, 4])
    admit_and_compute(blocks, first)
    assert first.block_nodes == []
    assert blocks.match([1, 2, 3, 4, 5]) == []
    blocks.free(first)
    assert blocks.match([1, 2, 3, 4, 5]) == []
    assert free_order(blocks) == [0, 1, 2, 3, 4, 5], "the blocks that were used last come first"


def test_room_counts_cached_blocks_of_the_own_prefix_once() -> None:
    blocks = BlockManager(4, 2)
    first = make([1, 2, 3, 4])
    admit_and_compute(blocks, first)
    blocks.free(first)
    second = make([1, 2, 3, 4, 5, 6, 7, 8], "second")  # four blocks, two of them in the cache and on the free list
    prefix = blocks.match(second.token_ids)
    assert blocks.can_admit(second, prefix)
    assert not blocks.can_admit(second, prefix, spare=1)
    third = make([1, 2, 3, 4, 5, 6, 7, 8, 9], "third")
    assert not blocks.can_admit(third, blocks.match(third.token_ids))


def test_can_extend_to_the_last_block() -> None:
    blocks = BlockManager(2, 3)
    sequence = make([1])
    assert blocks.can_extend(sequence, 6) and not blocks.can_extend(sequence, 7)
    blocks.extend(sequence, 3)
    assert sequence.block_table == [0]
    blocks.extend(sequence, 3)
    assert sequence.block_table == [0], "room that is there is not taken again"
    assert blocks.can_extend(sequence, 6) and not blocks.can_extend(sequence, 7)


def test_check_sees_a_lost_block_and_one_held_twice() -> None:
    blocks = BlockManager(4, 2)
    sequence = make([1, 2, 3])
    admit_and_compute(blocks, sequence)
    lost = sequence.block_table.pop()
    with pytest.raises(AssertionError):
        blocks.check([sequence])
    sequence.block_table += [lost, lost]
    with pytest.raises(AssertionError, match="repeats a block"):
        blocks.check([sequence])
