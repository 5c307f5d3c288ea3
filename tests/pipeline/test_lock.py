import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from bucket_server import BUCKET, CREDENTIALS, bucket_server
from faulty_proxy import faulty_proxy
from pipeline.errors import LockedError, StoreError
from pipeline.storage import lock
from pipeline.storage.lock import LOCK, exclusive
from pipeline.storage.objects import objects_at
from support import aptile, assert_same_bytes, save_scene, textured

HOLDER = """
import sys
from pipeline.errors import LockedError
from pipeline.storage import lock
from pipeline.storage.objects import objects_at

if sys.argv[2:]:
    lock.BEAT_S, lock.STALE_S = map(float, sys.argv[2:])
with lock.exclusive(objects_at(sys.argv[1])) as held:
    print("held", flush=True)
    for line in sys.stdin:
        try:
            held.check()
            print("mine", flush=True)
        except LockedError as error:
            print(error, flush=True)
"""
ELSEWHERE = {"pid": 7, "host": "elsewhere", "kernel": "another", "processes": "", "started": 1.0}
ELSEWHERE |= {"token": "another"}


@pytest.fixture(scope="module")
def server():
    with bucket_server() as address:
        yield address


@pytest.fixture(params=["folder", "bucket"])
def place(request, tmp_path, monkeypatch):
    """Where a store is to be: a folder, a prefix of a bucket."""
    if request.param == "folder":
        return str(tmp_path / "store")
    return _bucket(request, monkeypatch)


@pytest.fixture
def bucket(request, monkeypatch):
    return _bucket(request, monkeypatch)


def _bucket(request, monkeypatch):
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    _through(monkeypatch, request.getfixturevalue("server"))
    return f"s3://{BUCKET}/{abs(hash(request.node.name))}"


def _through(monkeypatch, address):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*address))


@pytest.fixture
def quick(monkeypatch):
    """Everything about locks happens thirty times faster."""
    monkeypatch.setattr(lock, "BEAT_S", 0.1)
    monkeypatch.setattr(lock, "STALE_S", 1.0)


@contextmanager
def holder(place, *times):
    """Another process that holds the lock, and says so when asked."""
    command = [sys.executable, "-c", HOLDER, place, *map(str, times)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def ask(process) -> str:
    process.stdin.write("?\n")
    process.stdin.flush()
    return process.stdout.readline()


def write_lock(place, **facts):
    objects_at(place).write(LOCK, json.dumps({**ELSEWHERE, **facts}).encode())


def _check_until_it_fails(held) -> None:
    while True:
        held.check()
        time.sleep(0.05)


def content(place) -> bytes:
    return objects_at(place).read(LOCK)


def test_a_live_holder_is_named(place):
    with holder(place) as process:
        begun = time.monotonic()
        with pytest.raises(LockedError) as caught, exclusive(objects_at(place)):
            pass
        took = time.monotonic() - begun
        assert f"being written by process {process.pid} on {socket.gethostname()};" in str(
            caught.value
        )
        assert ask(process) == "mine\n"
    print(f"refused after {took:.2f} s")


def test_the_command_line_ends_with_code_5(place, tmp_path, capsys):
    save_scene(tmp_path / "archive" / "a.tif", textured((1, 64, 64)))
    with holder(place) as process:
        assert aptile("preprocess", tmp_path / "archive", place, "--workers", 1) == 5
        assert f"process {process.pid} on" in capsys.readouterr().err
        assert list(objects_at(place).names()) == [LOCK]


def test_a_lock_given_back_is_free(place):
    for _ in range(2):
        with exclusive(objects_at(place)) as held:
            held.check()
            assert json.loads(content(place))["pid"] == os.getpid()
        assert content(place) == b""


@pytest.mark.parametrize("reaped", [True, False])
def test_a_holder_that_was_killed_here_is_followed_at_once(place, monkeypatch, reaped):
    monkeypatch.setattr(lock, "_is_still", lambda *_: pytest.fail("nothing to watch"))
    with holder(place) as process:
        process.send_signal(signal.SIGKILL)
        if reaped:
            process.wait()
        else:
            # Without taking note of its end, so that its number stays in use.
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with exclusive(objects_at(place)) as held:
            held.check()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "facts",
    [{}, {"host": socket.gethostname()}, {"pid": os.getpid(), "host": socket.gethostname()}],
    ids=["other machine", "same name", "same name and number"],
)
def test_a_holder_elsewhere_that_stands_still_is_followed(place, monkeypatch, facts):
    looks = []
    real = lock._is_still
    monkeypatch.setattr(lock, "_is_still", lambda *given: looks.append(1) or real(*given))
    write_lock(place, **facts)
    with exclusive(objects_at(place)) as held:
        held.check()
    assert looks == [1]


@pytest.mark.usefixtures("quick")
def test_a_holder_elsewhere_that_beats_is_named(place):
    stop = threading.Event()

    def beat() -> None:
        beats = 0
        while not stop.wait(0.05):
            beats += 1
            write_lock(place, beats=beats if place.startswith("s3:") else 0)

    write_lock(place)
    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with (
            pytest.raises(LockedError, match="by process 7 on elsewhere"),
            exclusive(objects_at(place)),
        ):
            pass
    finally:
        stop.set()
        beating.join()


@pytest.mark.usefixtures("quick")
def test_a_lock_nobody_can_read_is_watched_too(place):
    objects_at(place).write(LOCK, b"\xff{")
    with exclusive(objects_at(place)) as held:
        held.check()


@pytest.mark.usefixtures("quick")
def test_a_holder_that_stood_still_notices(bucket):
    with holder(bucket, 0.1, 1.0) as process:
        assert ask(process) == "mine\n"
        process.send_signal(signal.SIGSTOP)
        with exclusive(objects_at(bucket)) as held:
            process.send_signal(signal.SIGCONT)
            assert "the lock is no longer this process's" in ask(process)
            held.check()
        assert "the lock is no longer this process's" in ask(process)
        assert content(bucket) == b""


def test_a_holder_that_stands_still_in_a_folder_keeps_it(tmp_path):
    """The kernel knows that it lives."""
    place = str(tmp_path / "store")
    with holder(place) as process:
        process.send_signal(signal.SIGSTOP)
        with (
            pytest.raises(LockedError, match=f"process {process.pid} on"),
            exclusive(objects_at(place)),
        ):
            pass
        process.send_signal(signal.SIGCONT)
        assert ask(process) == "mine\n"


@pytest.mark.usefixtures("quick")
def test_a_lock_that_is_removed_or_replaced_is_lost(place):
    for change in (lambda: objects_at(place).remove([LOCK]), lambda: write_lock(place)):
        with exclusive(objects_at(place)) as held:
            change()
            held._thread.join()
            with pytest.raises(LockedError, match="no longer this process's"):
                held.check()
        objects_at(place).remove([LOCK])


@pytest.mark.usefixtures("quick")
def test_beats_that_fail_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE_S", 1.5)
    objects = objects_at(str(tmp_path))
    with exclusive(objects) as held:
        (tmp_path / LOCK).unlink()
        (tmp_path / LOCK).mkdir()
        with pytest.raises(StoreError, match=r"could not be kept for \d s: .*Is a directory"):
            _check_until_it_fails(held)


@pytest.mark.usefixtures("quick")
def test_beats_whose_answers_are_lost_count(server, bucket, monkeypatch):
    def lose(method, path, headers):
        beat = method == "PUT" and path.endswith(LOCK) and "If-Match" in headers
        return "reset_after" if beat else None

    with faulty_proxy(server, lose) as proxy:
        _through(monkeypatch, proxy.server_address)
        with exclusive(objects_at(bucket)) as held:
            while proxy.counts["reset_after"] < 5:
                held.check()
                time.sleep(0.05)
        assert not held._lost
    print(f"{proxy.counts['reset_after']} beats without an answer")


def test_a_heartbeat_keeps_no_interpreter_alive(place):
    script = (
        "import sys; from pipeline.storage import lock; "
        "from pipeline.storage.objects import objects_at; "
        "own = lock._lock_of(objects_at(sys.argv[1])); own.take(); held = lock.Held(own); "
        "held.check(); sys.stdout.write('end')"
    )
    ended = subprocess.run([sys.executable, "-c", script, place], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "end", "")


@pytest.mark.usefixtures("quick")
def test_where_the_kernel_has_no_locks_the_beat_decides(tmp_path, monkeypatch):
    place = str(tmp_path / "store")
    with holder(place, 0.1, 1.0) as process:
        monkeypatch.setattr(lock, "_flock", lambda _: None)
        with (
            pytest.raises(LockedError, match=f"process {process.pid} on"),
            exclusive(objects_at(place)),
        ):
            pass
        process.kill()
        process.wait()
        with exclusive(objects_at(place)):
            pass
    rounds, winners = 10, []
    with ThreadPoolExecutor(3) as pool:
        for turn in range(rounds):
            barrier = threading.Barrier(3)

            def attempt(place=f"{place}/{turn}", barrier=barrier) -> bool:
                barrier.wait()
                try:
                    with exclusive(objects_at(place)):
                        barrier.wait()
                except LockedError:
                    barrier.wait()
                    return False
                return True

            winners.append(sum(f.result() for f in [pool.submit(attempt) for _ in range(3)]))
    print(f"without kernel locks, holders in {rounds} rounds of 3: {winners}")
    assert max(winners) == 1


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.full)])
def test_two_jobs_at_once_make_one_store(tmp_path, rounds):
    for number in range(3):
        save_scene(tmp_path / "archive" / f"{number}.tif", textured((1, 96, 96), seed=number))
    options = ("--workers", "1", "--set", "modality.value_range=[0, 10000]")
    command = [sys.executable, "-m", "workflows.cli", "preprocess", str(tmp_path / "archive")]
    assert aptile("preprocess", tmp_path / "archive", tmp_path / "alone", *options) == 0
    codes = []
    for turn in range(rounds):
        store = tmp_path / f"store-{turn}"
        both = [
            subprocess.Popen([*command, str(store), *options], stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        told = [process.communicate()[1] for process in both]
        codes.append(sorted(process.returncode for process in both))
        assert codes[-1] in ([0, 0], [0, 5]), told
        assert_same_bytes(tmp_path / "alone", store)
    print(f"exit codes of two jobs at once: {codes}")
