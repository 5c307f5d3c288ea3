"""Failures that may pass, and trying again: one policy for disks, web servers and buckets."""

import errno
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from pipeline.errors import SceneError
from pipeline.scenes import Retries

T = TypeVar("T")

# What network file systems and sockets say when a server is away or a cable is out.
_PASSING = {
    getattr(errno, name)
    for name in (
        "EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EINTR", "EBUSY", "ENETDOWN", "ENETUNREACH", "ENETRESET",
        "ECONNABORTED", "ECONNRESET", "ECONNREFUSED", "EHOSTDOWN", "EHOSTUNREACH", "ENOTCONN", "EPIPE",
        "EREMOTEIO", "ENOLINK", "ECOMM", "ENOBUFS", "EPROTO", "ESHUTDOWN", "ENONET",
    )
    if hasattr(errno, name)
}  # fmt: skip


class Passing(Exception):  # noqa: N818 (a reason to try again, which nobody outside sees)
    """Something failed that may work the next time; not before `wait_s`, where the server says so."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


def retrying(work: Callable[[], T], what: str, retries: Retries) -> T:
    """What `work` returns, which is called again while it raises Passing.

    Raises SceneError with the number of attempts and the last reason when they are used up; any other
    error at once.
    """
    started, wait_s = time.monotonic(), retries.first_wait_s
    for attempt in range(1, retries.attempts + 1):
        try:
            return work()
        except Passing as failure:
            last, asked_s = failure, failure.wait_s
        pause_s = min(max(wait_s, asked_s), retries.longest_wait_s)
        took_s = time.monotonic() - started
        if attempt == retries.attempts or took_s + pause_s > retries.budget_s:
            break
        time.sleep(pause_s)
        wait_s = min(wait_s * retries.factor, retries.longest_wait_s)
    times = "once" if attempt == 1 else f"{attempt} times in {took_s:.1f} s"
    raise SceneError(f"{what} cannot be read: tried {times}, at last: {last}")


def on_disk(work: Callable[[], T], what: str, retries: Retries) -> T:
    """As `retrying`, for calls of the operating system. Raises OSError for what does not pass."""

    def tried() -> T:
        try:
            return work()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            raise Passing(str(error.strerror)) from None

    return retrying(tried, what, retries)


def asked_wait_s(header: str | None) -> float:
    """Seconds of a Retry-After header, which holds a number or a date; 0 for anything else."""
    if header is None:
        return 0.0
    if header.strip().isdecimal():
        return float(header)
    try:
        until = parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())
