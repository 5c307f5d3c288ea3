"""Random numbers that are pure functions of (seed, epoch, key, purpose): nothing is kept between calls.

A number does not depend on which other keys are drawn, nor in which order or process, so any worker can
draw any tile's numbers. Keys are hashed by the finaliser of SplitMix64, twice.
"""

import hashlib

import numpy as np

Keys = np.ndarray | tuple[np.ndarray | int, ...]

_WORD = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
_UNIT = 2.0**-53
# Hashed so many at once, the numbers stay in the processor's cache: three times as fast.
_AT_ONCE = 1 << 14
_LARGEST_BOUND = 2**32


def uniform(seed: int, epoch: int, keys: Keys, purpose: str) -> np.ndarray:
    """float64 in [0, 1), one per key, in multiples of 2**-53.

    `keys` is an integer array of any shape, or a tuple of arrays and numbers that broadcast (tile and
    timestep, say); the result has its shape. Another `purpose` gives numbers that have nothing to do
    with these.
    """
    return (bits(seed, epoch, keys, purpose) >> np.uint64(11)).astype(np.float64) * _UNIT


def integers(seed: int, epoch: int, keys: Keys, purpose: str, bound: int) -> np.ndarray:
    """int64 in 0 ... `bound` - 1, one per key, equally likely to within 2**-21; keys as in `uniform`."""
    assert 1 <= bound <= _LARGEST_BOUND, bound
    return (uniform(seed, epoch, keys, purpose) * bound).astype(np.int64)


def permutation(seed: int, epoch: int, size: int, purpose: str) -> np.ndarray:
    """int64 [size]: 0 ... `size` - 1 in a random order."""
    index_bits = max(1, (size - 1).bit_length())
    low = np.uint64((1 << index_bits) - 1)
    index = np.arange(size, dtype=np.uint64)
    # No two words are equal, so every sort of every processor gives the same order.
    words = (bits(seed, epoch, index, purpose) & ~low) | index
    words.sort()
    return (words & low).astype(np.int64)


def bits(seed: int, epoch: int, keys: Keys, purpose: str) -> np.ndarray:
    """uint64 of 64 random bits, one per key; keys as in `uniform`."""
    start = _start(seed, epoch, purpose)
    parts = keys if isinstance(keys, tuple) else (keys,)
    words = np.broadcast_arrays(*(np.asarray(part) for part in parts))
    state = _hashed(_as_words(words[0]), start)
    for part in words[1:]:
        state = _hashed(state + _as_words(part) * np.uint64(_GAMMA), start)
    return state


def _start(seed: int, epoch: int, purpose: str) -> int:
    state = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    for number in (seed, epoch):
        state = int(_mixed(np.array([(state + number * _GAMMA) & _WORD], np.uint64))[0])
        state = (state + _GAMMA) & _WORD
    return state


def _as_words(keys: np.ndarray) -> np.ndarray:
    assert keys.dtype.kind in "iu", keys.dtype
    return (
        keys.astype(np.int64).astype(np.uint64)
        if keys.dtype.kind == "i"
        else keys.astype(np.uint64)
    )


def _hashed(words: np.ndarray, start: int) -> np.ndarray:
    """Two rounds of mixing, so that streams of different starts never run in parallel."""
    flat = np.ascontiguousarray(words).reshape(-1)
    out = np.empty_like(flat)
    for begin in range(0, flat.size, _AT_ONCE):
        piece = flat[begin : begin + _AT_ONCE] * np.uint64(_GAMMA)
        piece += np.uint64(start)
        _mixed(piece)
        piece ^= np.uint64(start)
        out[begin : begin + _AT_ONCE] = _mixed(piece)
    return out.reshape(words.shape)


def _mixed(words: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, in place: every bit of a word decides about every bit."""
    for shift, multiplier in _ROUNDS:
        words ^= words >> np.uint64(shift)
        words *= np.uint64(multiplier)
    words ^= words >> np.uint64(_LAST_SHIFT)
    return words
