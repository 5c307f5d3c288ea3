"""Several hosts in small: a scheduler and workers in processes, and network namespaces, of their own.

While a job runs one worker is killed, one is cut off, and a new one joins; the file system is shared.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from distributed import Client

from dask_processes import Dask, dask_processes, send
from pipeline.jobs.job import JobReport, run_job
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config
from support import Watching, assert_same_bytes, save_scene, textured

SMALL = (
    "store.tile_size_px=32",
    "store.shard_tiles=2",
    "modality.value_range=[0, 10000]",
    "partition.thresholds=[1.5, 2.5]",
)
# How soon a scheduler gives up a silent worker; Dask makes it ten heartbeats, 5 s.
CONFIG = {"DISTRIBUTED__SCHEDULER__WORKER_TTL": "2s"}
KILL_AFTER, CUT_AFTER = 2, 6
# Of this process, so that others can do the same at the same time.
LINK, NETWORK = f"apt{os.getpid()}", f"10.211.{os.getpid() % 254 + 1}"


def run(archive: Path, store: Path, observer: Watching, *overrides: str) -> JobReport:
    config = load_config(PreprocessConfig, None, [*SMALL, *overrides])
    return run_job(str(archive), store, config, observer)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    for number in range(3):
        pixels = textured((3, 128, 160), seed=number)
        save_scene(folder / f"{number}.tif", pixels, compress="deflate")
    return folder


@pytest.fixture(scope="module")
def undisturbed(archive, tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "local"
    run(archive, path, Watching(), "run.workers=1")
    return path


class Disturbing(Watching):
    """An observer that does something once so many shards are done."""

    def __init__(self, events: dict[int, Callable[[], None]]) -> None:
        super().__init__()
        self.events = events

    def shard_done(self, tiles):
        super().shard_done(tiles)
        if self.done in self.events:
            self.events[self.done]()


def disturbed_job(
    dask: Dask,
    address: str,
    archive: Path,
    store: Path,
    hosts: list[tuple[str, ...]],
    cut: Callable[[subprocess.Popen], None],
) -> subprocess.Popen:
    """A job whose first worker is killed and whose second one is cut off, when a third one has joined.

    Returns the worker that was cut off.
    """
    killed, silent = (dask.worker(address, within=host) for host in hosts[:2])
    with Client(address, set_as_default=False) as client:
        client.wait_for_workers(2)

        known = addresses(client)

        def kill_and_replace():
            send(killed, signal.SIGKILL)
            dask.worker(address, within=hosts[2])
            while addresses(client) <= known:
                time.sleep(0.05)

        events = {KILL_AFTER: kill_and_replace, CUT_AFTER: lambda: cut(silent)}
        report = run(archive, store, Disturbing(events), f"run.scheduler={address}")
        left = addresses(client)
    assert killed.wait() == -signal.SIGKILL
    print(f"{report.shards} shards; 1 worker killed, 1 cut off, 1 joined; {len(left)} left")
    assert left - known
    assert report.shards_written == report.shards == 30
    return silent


def assert_same_store(undisturbed: Path, store: Path) -> None:
    """The same bytes; files that killed writers left under temporary names are no part of a store."""
    left = list(store.rglob("*.partial"))
    for path in left:
        path.unlink()
    print(f"{len(left)} half-written files left")
    assert len(left) <= 2
    assert_same_bytes(undisturbed, store)


def addresses(client: Client) -> set[str]:
    """Of the workers there are."""
    return set(client.scheduler_info(n_workers=-1)["workers"])


@pytest.fixture
def dask(tmp_path):
    with dask_processes(tmp_path / "processes", **CONFIG) as started:
        yield started


def test_killed_and_stopped_workers_change_no_byte(dask, archive, undisturbed, tmp_path):
    def stop(worker):
        send(worker, signal.SIGSTOP)

    address = dask.scheduler("--host", "127.0.0.1")
    silent = disturbed_job(dask, address, archive, tmp_path / "store", [()] * 3, stop)
    # It goes on with what it was writing when the store is long committed. It may end when it hears that
    # it is out, or go on as a worker.
    send(silent, signal.SIGCONT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        silent.wait(2)
    send(silent, signal.SIGKILL)
    silent.wait()
    assert_same_store(undisturbed, tmp_path / "store")


def ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True)


@contextlib.contextmanager
def hosts_on_a_bridge(count: int) -> Iterator[list[str]]:
    """Names of network namespaces, each with the address NETWORK.(number + 2), on one bridge."""
    names = [f"aptile-{os.getpid()}-{number}" for number in range(count)]
    with contextlib.ExitStack() as stack:
        try:
            ip("link", "add", f"{LINK}b", "type", "bridge")
            stack.callback(ip, "link", "del", f"{LINK}b")
            ip("addr", "add", f"{NETWORK}.1/24", "dev", f"{LINK}b")
            ip("link", "set", f"{LINK}b", "up")
            for number, name in enumerate(names):
                ip("netns", "add", name)
                stack.callback(ip, "netns", "del", name)
                ip("link", "add", f"{LINK}-{number}", "type", "veth", "peer", "eth0", "netns", name)
                ip("link", "set", f"{LINK}-{number}", "master", f"{LINK}b", "up")
                ip("-n", name, "addr", "add", f"{NETWORK}.{number + 2}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    ip("-n", name, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', error)!r:.200}")
        yield names


def test_workers_on_other_hosts_that_die_or_are_cut_off_change_no_byte(
    dask, archive, undisturbed, tmp_path
):
    with hosts_on_a_bridge(4) as names:
        scheduler, *workers = (("ip", "netns", "exec", name) for name in names)

        def cut(_):
            ip("link", "set", f"{LINK}-2", "down")

        address = dask.scheduler("--host", f"{NETWORK}.2", within=scheduler)
        disturbed_job(dask, address, archive, tmp_path / "store", workers, cut)
        dask.end()
    assert_same_store(undisturbed, tmp_path / "store")
