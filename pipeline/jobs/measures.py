"""What tasks took: never part of a store, whose bytes must not depend on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from time import perf_counter
from typing import Protocol, TypeVar

MEASURES = "measures"


class _Pixels(Protocol):
    """Something that was read."""

    @property
    def pixel_bytes(self) -> int: ...


PixelsT = TypeVar("PixelsT", bound=_Pixels)


@dataclass
class Measures:
    """Seconds by what they went into, and bytes: of decoded pixels in, of stored objects out."""

    read: float = 0.0
    score: float = 0.0
    partition: float = 0.0
    write: float = 0.0
    pixel_bytes: int = 0
    object_bytes: int = 0

    def add(self, other: "Measures") -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the seconds spent inside to one of the steps."""
        begin = perf_counter()
        try:
            yield
        finally:
            setattr(self, step, getattr(self, step) + perf_counter() - begin)

    def reading(self, parts: Iterator[PixelsT]) -> Iterator[PixelsT]:
        """The same parts; adds what it took to read them."""
        while True:
            with self.timed("read"):
                part = next(parts, None)
            if part is None:
                return
            self.pixel_bytes += part.pixel_bytes
            yield part
            # Not held while the next one is read.
            del part
