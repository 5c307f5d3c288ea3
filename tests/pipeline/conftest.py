"""The picture whose scores are known by hand, and a bucket."""

import numpy as np
import pytest

from bucket_server import BUCKET, CREDENTIALS, bucket_server


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


@pytest.fixture(scope="module")
def server():
    with bucket_server() as address:
        yield address


@pytest.fixture
def bucket(server, monkeypatch):
    """Clients find the server as they would any other: by the environment."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server))
    return f"s3://{BUCKET}"
