"""The picture whose scores are known by hand."""

import numpy as np
import pytest


@pytest.fixture(scope="session")
def golden_image() -> np.ndarray:
    """float64 [3, 64, 64]: a flat, a ramp, a checkerboard and a noisy quadrant."""
    n = 64
    y, x = np.mgrid[:n, :n]
    image = np.empty((3, n, n))
    for c in range(3):
        image[c] = ((x * x + 3 * y * y + 7 * x * y + 11 * c) % 251) / 251
        image[c, :32, :32] = 0.25
        image[c, :32, 32:] = (x / n)[:32, 32:]
        image[c, 32:, :32] = (((x // 4 + y // 4) % 2) * 0.6 + 0.1)[32:, :32]
    return image
