"""The order of samples: computed, not stored, so that start-up and memory do not grow with the corpus.

A sample number alone decides which window it is; ranks, workers and restarts have no say.
"""

import hashlib

import numpy as np
import numpy.typing as npt

from megatron_bipe.types import IntArray

UintArray = npt.NDArray[np.uint64]

ROUNDS = 8  # four are pseudo-random in theory (Luby and Rackoff 1988); narrow halves want more
MAX_SIZE = 2**62


def permute(index: UintArray, size: int, key: int) -> UintArray:
    """A keyed bijection on [0, size).

    A Feistel network permutes the numbers of as many bits as `size` needs, fewer than 2 * size of them;
    those that leave [0, size) go through it again until they are back ("cycle walking").

    Args:
        index: any shape, each below `size`.
        size: 1 to 2 ** 62.
        key: any integer; every key is another permutation.

    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains".
    """
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"a permutation of {size} numbers; 1 to {MAX_SIZE} can be")
    index = np.asarray(index, dtype=np.uint64)
    if index.size and int(index.max()) >= size:
        raise IndexError(f"index {index.max()} of a permutation of {size}")
    bits = (size - 1).bit_length()
    keys = _round_keys(key)
    flat = _feistel(index.ravel(), bits, keys)
    outside = np.flatnonzero(flat >= size)
    while outside.size:
        flat[outside] = _feistel(flat[outside], bits, keys)
        outside = outside[flat[outside] >= size]
    return flat.reshape(index.shape)


class SampleOrder:
    """Endless shuffled epochs over the windows of a dataset. Its whole state is the number of samples consumed.

    Args:
        num_samples: windows of an epoch.
        seed: of the shuffle; each epoch has a permutation of its own.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        if not 1 <= num_samples <= MAX_SIZE:
            raise ValueError(f"an epoch of {num_samples} samples; 1 to {MAX_SIZE} can be")
        self.num_samples = num_samples
        self.seed = seed

    def sequence_indices(self, first_sample: int, count: int) -> IntArray:
        """Windows of samples [first_sample, first_sample + count), int64 [count]; the range may span epochs."""
        if first_sample < 0 or count < 0:
            raise ValueError(f"{count} samples from {first_sample}")
        parts = []
        sample, stop = first_sample, first_sample + count
        while sample < stop:
            epoch, start = divmod(sample, self.num_samples)
            length = min(self.num_samples - start, stop - sample)
            within = np.arange(start, start + length, dtype=np.uint64)
            parts.append(permute(within, self.num_samples, self._key(epoch)))
            sample += length
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    def _key(self, epoch: int) -> int:
        digest = hashlib.sha256(f"{self.seed}/{epoch}".encode()).digest()
        return int.from_bytes(digest[:8], "little")


def _feistel(value: UintArray, bits: int, keys: UintArray) -> UintArray:
    """Bijection on [0, 2 ** bits): two halves take turns at being changed by a hash of the other."""
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    high, low = value >> low_bits, value & low_mask
    for turn in range(0, ROUNDS, 2):
        high = high ^ (_hash(low ^ keys[turn]) & high_mask)
        low = low ^ (_hash(high ^ keys[turn + 1]) & low_mask)
    return (high << low_bits) | low


def _hash(value: UintArray) -> UintArray:
    """The finaliser of SplitMix64 (Steele et al. 2014): all bits depend on all bits."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _round_keys(key: int) -> UintArray:
    digests = [hashlib.sha256(f"{key}:{turn}".encode()).digest()[:8] for turn in range(ROUNDS)]
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)
