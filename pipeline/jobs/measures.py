"""What tasks took: never part of a store, whose bytes must not depend on it."""

from dataclasses import dataclass, fields

MEASURES = "measures"


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
