"""Keys of the noise: the generator's own words, for whatever steps come."""

import numpy as np
import torch

from meshlm.engine.noise import Noise
from meshlm.engine.staging import Staging

STEPS = 16


def splitmix64(seed: int, position: int) -> tuple[int, int]:
    """The words of Steele et al.'s generator, in plain integers."""
    mask = 2**64 - 1
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    return (z & 0xFFFFFFFF) - 2**31, (z >> 32) - 2**31


def made(seeds: list[int], positions: list[int], num_steps: int = STEPS) -> Noise:
    noise = Noise(np.array(seeds, np.uint64), positions, num_steps)
    assert not noise.is_there
    staged = Staging(torch.device("cpu")).open(noise.shapes)
    noise.write(staged.host)
    noise.take(staged.send().arrays)
    assert noise.is_there
    return noise


def test_keys_are_two_int32_words_all_different() -> None:
    seeds, seen = [0, 1, 2, 2**63 - 1, 2**63], set()
    noise = made(seeds, [0] * len(seeds), 2000)
    for position in range(2000):
        keys = noise.keys([position] * len(seeds))
        assert keys.dtype == torch.int32 and keys.is_contiguous()
        words = [tuple(key) for key in keys.tolist()]
        assert words == [splitmix64(seed, position) for seed in seeds]
        seen.update(words)
    assert len(seen) == 10000


def test_each_sequence_has_the_noise_of_its_own_position() -> None:
    noise = made([3, 4], [5, 9])
    for step in range(STEPS):
        positions = [5 + step, 9 + step]
        assert noise.has(positions)
        words = [tuple(key) for key in noise.keys(positions).tolist()]
        assert words == [splitmix64(3, positions[0]), splitmix64(4, positions[1])]


def test_it_has_what_follows_step_by_step_and_nothing_else() -> None:
    noise = made([3, 4], [5, 9])
    assert noise.has([5, 9]) and noise.has([4 + STEPS, 8 + STEPS])
    assert not noise.has([5 + STEPS, 9 + STEPS]) and not noise.has([4, 8]), "before and behind"
    assert not noise.has([6, 9]) and not noise.has([5, 10]), "one alone went on"
