"""Statistics of the numbers in each band, gathered piece by piece.

Pieces are merged in any order and any grouping with the same result, bit for bit: a histogram holds
whole counts, and sums are kept exactly, as integers. So value ranges and the normalisation of training do
not depend on which worker read which tile first.

Integers of 8 and 16 bits are counted by value. Any other number is counted under the nearest one of 13
significant binary digits: percentiles are then within 2**-13 (0.0123 %) of the exact ones, and exact for
integers up to 8192. Integers beyond 2**53 are taken as the nearest float64.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Self

import numpy as np
from pydantic import Field, ValidationError

from pipeline.errors import IntegrityError
from pipeline.scorers.config import Frozen

# Bits of a float64 that are rounded away before counting: 52 of the fraction, 12 are kept.
_ROUNDED_BITS = 40
# Every float64 is a whole multiple of 2**-1074, the smallest positive one.
_UNIT_BITS = 1074
# A float64 significand of 53 bits in three limbs: products of two limbs are below 2**37, and the sum of
# so many of them stays at or below 2**53, where float64 sums are exact.
_LIMB_BITS = (18, 18, 17)
_CHUNK = 2**16
# Histograms over a wider span of keys are made by sorting instead of a table.
_TABLE = 2**22
_INT64_SQUARES = 2**31


class BandSummary(Frozen):
    """What the store keeps of one band, in the archive's own numbers; all but `count` are None without a
    pixel. `std` is that of the population; `p01` is the 1st percentile."""

    count: int = Field(ge=0)
    mean: float | None
    std: float | None
    min: float | None
    max: float | None
    p01: float | None
    p02: float | None
    p50: float | None
    p98: float | None
    p99: float | None

    def to_json(self) -> dict[str, float | int | None]:
        """The numbers by name, as the store's header holds them."""
        return self.model_dump()

    @classmethod
    def from_json(cls, entry: Any) -> Self:
        """What `to_json` made. Raises IntegrityError for anything else."""
        try:
            return cls.model_validate(entry)
        except ValidationError as error:
            reason = " ".join(str(error).split())
            raise IntegrityError(
                f"the statistics of a band in the store's zarr.json cannot be used ({reason:.200}); the "
                "store is damaged, preprocess into a new one"
            ) from None


@dataclass(frozen=True, eq=False)
class _Band:
    """One band. `keys` int64 ascending and `counts` int64 are its histogram; `total` and `squares` are the
    sums of the numbers and of their squares in units of 2**-1074 and 2**-2148; `low` and `high` are the
    smallest and largest number, infinite without one."""

    keys: np.ndarray
    counts: np.ndarray
    total: int
    squares: int
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class BandStats:
    """Statistics of the pixels of some bands, all of one type.

    `BandStats.of` describes one piece, `merge` joins two; nothing is ever changed in place.
    """

    dtype: str
    bands: tuple[_Band, ...]

    @classmethod
    def of(cls, pixels: np.ndarray) -> Self:
        """Statistics of valid pixels [band, pixel] of a real type; without a pixel, those of nothing.

        Raises ValueError for NaN, infinity and other types.
        """
        if pixels.ndim != 2 or pixels.dtype.kind not in "iuf":
            raise ValueError(
                f"pixels are {pixels.dtype} of shape {pixels.shape}; expected real numbers [band, pixel]"
            )
        describe = _of_small_integers if _is_small_integer(pixels.dtype) else _of_any
        pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
        return cls(pixels.dtype.name, tuple(describe(band) for band in pixels))

    def merge(self, other: Self) -> Self:
        """Statistics of both together; ValueError unless their bands and types agree."""
        if (self.dtype, len(self.bands)) != (other.dtype, len(other.bands)):
            raise ValueError(
                f"statistics of {len(other.bands)} {other.dtype} bands cannot join those of "
                f"{len(self.bands)} {self.dtype} bands"
            )
        joined = (_merge(a, b) for a, b in zip(self.bands, other.bands, strict=True))
        return type(self)(self.dtype, tuple(joined))

    @property
    def count(self) -> np.ndarray:
        """Pixels of every band, int64 [band]."""
        return np.array([_count(band) for band in self.bands], np.int64)

    @property
    def min(self) -> np.ndarray:
        """Smallest number, float64 [band]; NaN without a pixel."""
        return self._each(lambda band, _: band.low)

    @property
    def max(self) -> np.ndarray:
        """Largest number, float64 [band]; NaN without a pixel."""
        return self._each(lambda band, _: band.high)

    @property
    def mean(self) -> np.ndarray:
        """Mean, float64 [band], correctly rounded; NaN without a pixel."""
        return self._each(lambda band, count: band.total / (count << _UNIT_BITS))

    @property
    def std(self) -> np.ndarray:
        """Standard deviation of the population, float64 [band]; NaN without a pixel."""
        return self._each(_std)

    def percentile(self, q: float) -> np.ndarray:
        """float64 [band]: the smallest number that at least `q` percent of the pixels do not exceed.

        NaN without a pixel; ValueError unless 0 <= q <= 100. See the module for how exact it is.
        """
        if not 0 <= q <= 100:
            raise ValueError(f"q is {q}; a percentile lies in 0 ... 100")
        number_of = int if _is_small_integer(np.dtype(self.dtype)) else _number
        return self._each(lambda band, count: _ranked(band, _rank(q, count), count, number_of))

    def value_ranges(self, low: float, high: float) -> tuple[tuple[float, float], ...]:
        """(low, high) per band, the numbers at those percentiles; a constant band gets a range of width 1
        from its value on. Raises ValueError for a band without a pixel."""
        if not self.count.all():
            raise ValueError("no pixel to take a value range from")
        bounds = zip(self.percentile(low).tolist(), self.percentile(high).tolist(), strict=True)
        return tuple(
            (a, b if b > a else max(a + 1.0, math.nextafter(a, math.inf))) for a, b in bounds
        )

    def summaries(self) -> tuple[BandSummary, ...]:
        """What the store keeps, one entry per band."""
        rows = {
            "mean": self.mean,
            "std": self.std,
            "min": self.min,
            "max": self.max,
            **{f"p{q:02}": self.percentile(q) for q in (1, 2, 50, 98, 99)},
        }
        return tuple(
            BandSummary(
                count=count,
                **{name: float(row[band]) if count else None for name, row in rows.items()},
            )
            for band, count in enumerate(self.count.tolist())
        )

    def to_json(self, names: Sequence[str]) -> dict[str, dict[str, float | int | None]]:
        """The summaries by band name, as the store's header holds them."""
        return {
            name: summary.to_json() for name, summary in zip(names, self.summaries(), strict=True)
        }

    def _each(self, number: Callable[[_Band, int], float]) -> np.ndarray:
        counts = [_count(band) for band in self.bands]
        pairs = zip(self.bands, counts, strict=True)
        return np.array([number(b, n) if n else math.nan for b, n in pairs], np.float64)


def _of_small_integers(values: np.ndarray) -> _Band:
    offset = int(np.iinfo(values.dtype).min)
    unsigned = values.view(f"u{values.dtype.itemsize}")
    if offset:
        # Flipping the sign bit puts two's complement in order.
        unsigned = unsigned ^ unsigned.dtype.type(-offset)
    table = np.bincount(unsigned)
    codes = np.flatnonzero(table)
    keys, counts = codes + offset, table[codes]
    if keys.size == 0:
        return _NOTHING
    # Beyond so many pixels the sum of squares may leave int64.
    exact = keys.astype(object) if values.size >= _INT64_SQUARES else keys
    total, squares = int(np.dot(exact, counts)), int(np.dot(exact * exact, counts))
    return _Band(
        keys,
        counts,
        total << _UNIT_BITS,
        squares << 2 * _UNIT_BITS,
        float(keys[0]),
        float(keys[-1]),
    )


def _of_any(values: np.ndarray) -> _Band:
    numbers = np.ascontiguousarray(values, np.float64)
    if numbers.size == 0:
        return _NOTHING
    # Adding 0 leaves no negative zero, which min and max would find by chance.
    low, high = float(numbers.min()) + 0.0, float(numbers.max()) + 0.0
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("pixels hold NaN or infinity; statistics are those of valid pixels")
    return _Band(*_counted(_keys(numbers)), *_exact_sums(numbers), low, high)


def _keys(numbers: np.ndarray) -> np.ndarray:
    """int64: the sign and the rounded bits, in the order of the numbers; 0 for both zeros."""
    magnitude = np.abs(numbers).view(np.int64)
    keys = (magnitude + (1 << (_ROUNDED_BITS - 1))) >> _ROUNDED_BITS
    return np.where(numbers < 0, -keys, keys)


def _number(key: int) -> float:
    """The number of 13 significant bits that a key stands for."""
    return math.copysign(float(np.int64(abs(key) << _ROUNDED_BITS).view(np.float64)), key)


def _counted(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = int(keys.min()), int(keys.max())
    if high - low >= _TABLE:
        return np.unique(keys, return_counts=True)
    table = np.bincount(keys - low)
    found = np.flatnonzero(table)
    return found + low, table[found]


def _exact_sums(numbers: np.ndarray) -> tuple[int, int]:
    """The sums of the numbers and of their squares, in units of 2**-1074 and 2**-2148.

    Numbers of one binary exponent are added as integers, limb by limb.
    """
    total = squares = 0
    for start in range(0, numbers.size, _CHUNK):
        significand, exponent = np.frexp(numbers[start : start + _CHUNK])
        lowest = int(exponent.min())
        exponent -= lowest
        limbs = _limbs(significand)
        # A number is the integer of its 53 bits times 2**(exponent - 53).
        unit = lowest - sum(_LIMB_BITS) + _UNIT_BITS
        for i, (limb, place) in enumerate(limbs):
            total += _shifted_sum(np.bincount(exponent, limb), 1, unit + place)
            for other, other_place in limbs[i:]:
                sums = np.bincount(exponent, limb * other)
                once_or_twice = _shifted_sum(sums, 2, 2 * unit + place + other_place)
                squares += once_or_twice if other is limb else 2 * once_or_twice
    return total, squares


def _limbs(significand: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Numbers in +-[0.5, 1) as three arrays of whole numbers, each with the power of two of its place
    in the 53-bit integer they make up."""
    limbs = []
    place, rest = sum(_LIMB_BITS), significand
    for bits in _LIMB_BITS:
        place -= bits
        rest = rest * 2.0**bits
        whole = np.trunc(rest)
        rest = rest - whole
        limbs.append((whole, place))
    return limbs


def _shifted_sum(sums: np.ndarray, step: int, shift: int) -> int:
    """The sum over k of `sums[k]`, a whole number, times 2**(step k + shift), also a whole number."""
    terms = ((int(sums[k]), step * int(k) + shift) for k in np.flatnonzero(sums))
    return sum(value << bits if bits >= 0 else value >> -bits for value, bits in terms)


def _merge(a: _Band, b: _Band) -> _Band:
    keys, places = np.unique(np.concatenate([a.keys, b.keys]), return_inverse=True)
    counts = np.zeros(keys.size, np.int64)
    np.add.at(counts, places, np.concatenate([a.counts, b.counts]))
    return _Band(
        keys,
        counts,
        a.total + b.total,
        a.squares + b.squares,
        min(a.low, b.low),
        max(a.high, b.high),
    )


def _count(band: _Band) -> int:
    return int(band.counts.sum())


def _std(band: _Band, count: int) -> float:
    """The root of (n * sum of squares - sum**2) / n**2, taken of integers: nothing cancels."""
    spread = count * band.squares - band.total**2
    return math.isqrt(spread // count**2) / (1 << _UNIT_BITS)


def _rank(q: float, count: int) -> int:
    """1 ... count: how many numbers are at least q percent of them."""
    return max(1, math.ceil(Fraction(q) * count / 100))


def _ranked(band: _Band, rank: int, count: int, number_of: Callable[[int], float]) -> float:
    """The number of that rank, 1 for the smallest."""
    if rank in (1, count):
        return band.low if rank == 1 else band.high
    place = int(np.searchsorted(np.cumsum(band.counts), rank))
    return min(max(number_of(int(band.keys[place])), band.low), band.high)


def _is_small_integer(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "iu" and dtype.itemsize <= 2


_NOTHING = _Band(np.empty(0, np.int64), np.empty(0, np.int64), 0, 0, math.inf, -math.inf)
