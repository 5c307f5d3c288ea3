"""Writers of one bucket at once, and what a fault makes of a write."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from bucket_server import bucket_server
from faulty_proxy import FAULTS, faulty_proxy
from pipeline.errors import IntegrityError, LockedError, StoreError
from pipeline.storage import lock
from pipeline.storage.buckets import BucketObjects
from pipeline.storage.lock import exclusive
from pipeline.storage.objects import objects_at


def test_rows_of_another_state_of_a_log_do_not_count(bucket):
    there = objects_at(f"{bucket}/rows")
    there.write("log.jsonl", b"one\n")
    there.append("log.jsonl", b"two\n")
    late = objects_at(f"{bucket}/rows")
    assert late.lines("log.jsonl") == b"one\ntwo\n"
    there.write("log.jsonl", b"one\ntwo\n")
    assert sorted(there.names()) == ["log.jsonl"]
    # As from a writer that has lost its lock, and does not know yet.
    late.append("log.jsonl", b"three\n")
    assert there.lines("log.jsonl") == b"one\ntwo\n"
    there.append("log.jsonl", b"four\n")
    (row,) = (n for n in there.names("log.jsonl.rows") if there.read(n) == b"four\n")
    there.write(row, b"altered\n")
    with pytest.raises(IntegrityError, match=rf"{row} does not hold what was written"):
        there.lines("log.jsonl")


@pytest.mark.parametrize("start", [None, b"before"])
def test_of_writers_at_once_exactly_one_wins(bucket, start):
    rounds, writers, winners = 50, 4, Counter()

    def attempt(place: BucketObjects, number: int, barrier: threading.Barrier) -> int | None:
        barrier.wait()
        try:
            place.swap("COMMIT.json", f"by {number}".encode(), start)
        except LockedError:
            return None
        return number

    with ThreadPoolExecutor(writers) as pool:
        for turn in range(rounds):
            places = [BucketObjects(f"{bucket}/race/{start}/{turn}") for _ in range(writers)]
            if start is not None:
                places[0].write("COMMIT.json", start)
            barrier = threading.Barrier(writers)
            made = [pool.submit(attempt, p, n, barrier) for n, p in enumerate(places)]
            won = [number for future in made if (number := future.result()) is not None]
            assert len(won) == 1
            assert places[0].read("COMMIT.json") == f"by {won[0]}".encode()
            winners[won[0]] += 1
    print(f"{rounds} rounds of {writers} writers: one winner each, {dict(winners)}")


def test_of_holders_at_once_exactly_one_has_the_lock(bucket):
    rounds, held = 20, 0
    with ThreadPoolExecutor(3) as pool:
        for turn in range(rounds):
            there = objects_at(f"{bucket}/lock-race/{turn}")
            barrier = threading.Barrier(3)

            def attempt(place=there, barrier=barrier) -> bool:
                barrier.wait()
                try:
                    with exclusive(place):
                        barrier.wait()
                except LockedError:
                    barrier.wait()
                    return False
                return True

            won = [future.result() for future in [pool.submit(attempt) for _ in range(3)]]
            assert sum(won) == 1
            held += 1
    print(f"{held} of {rounds} rounds of 3 holders: one had the lock, two were refused")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_conditional_write_that_meets_a_fault_once_is_made_once(
    server, bucket, monkeypatch, fault
):
    fates = Counter()
    for seen in (None, b"before"):
        for method in ("PUT", "GET"):
            left = [fault]

            def once(asked, *_, method=method, left=left):
                return left.pop() if asked == method and left else None

            with faulty_proxy(server, once) as proxy:
                monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server))
                place = objects_at(f"{bucket}/once/{fault}/{method}/{seen}")
                if seen is not None:
                    place.write("COMMIT.json", seen)
                monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*proxy.server_address))
                through = objects_at(place.location)
                try:
                    through.swap("COMMIT.json", b"after", seen)
                    fates["made"] += 1
                    assert place.read("COMMIT.json") == b"after"
                except LockedError:
                    # Only where the answer itself was made up.
                    fates["refused"] += 1
                    assert (fault, method, seen) == ("short_length", "GET", b"before")
                    assert place.read("COMMIT.json") == seen
                assert left == []
    print(f"{fault}: {dict(fates)}")
    assert fates["made"] >= 3


def test_a_server_that_stays_away_is_named(bucket, monkeypatch):
    with bucket_server() as gone:
        pass
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*gone))
    quick = lock._lock_of(objects_at(f"{bucket}/away"))
    with pytest.raises(
        StoreError, match=r"s3://scenes/away: cannot read .lock: .*then run the same"
    ):
        quick.take()
