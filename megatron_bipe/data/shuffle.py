"""The shuffled order of samples, computed and not stored: start-up time and memory do not grow with the corpus.

The sample number alone decides which sequence a sample is, independent of ranks, workers and restarts.
"""

import hashlib

import numpy as np
import numpy.typing as npt

from megatron_bipe.types import IntArray

UintArray = npt.NDArray[np.uint64]

ROUNDS = 8  # four are pseudo-random in theory (Luby and Rackoff 1988); small halves need more
MAX_SIZE = 2**62


def permute(index: UintArray, size: int, key: int) -> UintArray:
    """Apply a keyed bijection on [0, size).

    A Feistel network permutes the smallest range [0, 2 ** n) that contains [0, size). Numbers that leave [0, size) pass
    through it again until they are back ("cycle walking").

    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains".

    Args:
        index: any shape, each below `size`.
        size: 1 to 2 ** 62.
        key: any integer; each key selects another permutation.
    """
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"cannot permute {size} numbers; the size must be 1 to {MAX_SIZE}")
    index = np.asarray(index, dtype=np.uint64)
    if index.size and int(index.max()) >= size:
        raise IndexError(f"index {index.max()} is not in a permutation of {size} numbers")
    bits = (size - 1).bit_length()
    keys = _round_keys(key)
    flat = _feistel(index.ravel(), bits, keys)
    outside = np.flatnonzero(flat >= size)
    while outside.size:
        flat[outside] = _feistel(flat[outside], bits, keys)
        outside = outside[flat[outside] >= size]
    return flat.reshape(index.shape)


class SampleOrder:
    """Endless shuffled epochs over the sequences of a dataset. The complete state is the number of consumed samples.

    Args:
        num_samples: number of sequences in an epoch.
        seed: seed of the shuffle; each epoch has its own permutation.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        if not 1 <= num_samples <= MAX_SIZE:
            raise ValueError(f"an epoch has {num_samples} samples; the number must be 1 to {MAX_SIZE}")
        self.num_samples = num_samples
        self.seed = seed

    def sequence_indices(self, first_sample: int, count: int) -> IntArray:
        """Return the sequence number of each sample in [first_sample, first_sample + count), int64 [count]."""
        if first_sample < 0 or count < 0:
            raise ValueError(f"cannot take {count} samples from {first_sample}: both must be at least 0")
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
    """Apply a bijection on [0, 2 ** bits): each half in turn is XORed with a hash of the other."""
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    high, low = value >> low_bits, value & low_mask
    for turn in range(0, ROUNDS, 2):
        high = high ^ (_hash(low ^ keys[turn]) & high_mask)
        low = low ^ (_hash(high ^ keys[turn + 1]) & low_mask)
    return (high << low_bits) | low


def _hash(value: UintArray) -> UintArray:
    """Apply the finalizer of SplitMix64 (Steele et al. 2014), in which every output bit depends on all input bits."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _round_keys(key: int) -> UintArray:
    digests = [hashlib.sha256(f"{key}:{turn}".encode()).digest()[:8] for turn in range(ROUNDS)]
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)
