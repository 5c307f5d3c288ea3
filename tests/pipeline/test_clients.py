"""Clients of local workers, and of schedulers started by hand, plain and over TLS."""

import gc
import os
import re
import subprocess
from pathlib import Path

import pytest
from distributed import Client

from dask_processes import dask_processes
from one_scene import archive_in, run
from pipeline.errors import ConfigError, StoreError
from pipeline.jobs import clients
from pipeline.jobs.clients import client_of, security_of
from pipeline.jobs.hosts import local_paths, require_seen
from pipeline.jobs.process import ENVIRONMENT, MALLOC
from pipeline.settings.cluster import TlsConfig
from pipeline.settings.config import PreprocessConfig
from pipeline.settings.loading import load_config
from pipeline.settings.run import RunConfig
from support import assert_same_bytes

ROOT = Path(__file__).parents[2]
SLURM = "kind: slurm, jobs: 2, cores: 2, memory: 8GiB, walltime: '01:00:00'"


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return archive_in(tmp_path_factory.mktemp("archive"))


@pytest.fixture(scope="module")
def store(archive, tmp_path_factory):
    """The archive preprocessed by one local worker."""
    path = tmp_path_factory.mktemp("store") / "local"
    run(archive, path, "run.workers=1")
    return path


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("{workers: 2, scheduler: 'tcp://a:1'}", "run.workers has no effect beside run.scheduler"),
        (f"{{workers: 2, cluster: {{{SLURM}}}}}", "run.workers has no effect beside run.cluster"),
        (
            f"{{scheduler: 'tcp://a:1', cluster: {{{SLURM}}}}}",
            "run.scheduler has no effect beside run.cluster",
        ),
        (
            f"{{worker_memory: 4GiB, cluster: {{{SLURM}}}}}",
            "run.worker_memory has no effect beside run.cluster",
        ),
        (
            "{worker_memory: 4GiB, scheduler: 'tcp://a:1'}",
            "run.worker_memory has no effect beside run.scheduler",
        ),
        ("{worker_memory: 4G}", "'4G' is no amount of memory; expected one such as 4GiB"),
        ("{tls: {ca_file: a, cert_file: b, key_file: c}}", "run.tls has no effect without"),
        (
            "{tls: {ca_file: a, cert_file: b, key_file: c}, scheduler: 'tcp://a:1'}",
            "run.tls has no effect with run.scheduler tcp://a:1; expected a tls:// address",
        ),
        (
            "{tls: {ca_file: a, cert_file: b, key_file: c}, "
            "cluster: {kind: kubernetes, workers: 1, memory: 4GiB, image: i}}",
            "run.tls has no effect with a cluster of kind kubernetes",
        ),
        ("{cluster: {kind: sge}}", "cluster.kind is 'sge'; expected one of slurm, pbs, lsf, kub"),
        ("{cluster: {jobs: 2}}", "cluster.kind is not given; expected one of slurm, pbs"),
        (f"{{cluster: {{{SLURM}, project: x}}}}", "unknown key 'run.cluster.project'"),
        (f"{{cluster: {{{SLURM}, image: x}}}}", "unknown key 'run.cluster.image'"),
        (
            f"{{cluster: {{{SLURM}, wait_s: 0}}}}",
            "run.cluster.wait_s is 0; input should be greater",
        ),
        (f"{{cluster: {{{SLURM}, directives: ['a\\nb']}}}}".replace("'", '"'), "several lines"),
        (
            "{cluster: {kind: lsf, jobs: 2, cores: 2, memory: 8GiB, walltime: '01:00:00'}}",
            "walltime is '01:00:00'; expected HH:MM in quotes",
        ),
        (
            "{cluster: {kind: kubernetes, workers: 1, memory: 4GiB, image: i, queue: q}}",
            "unknown key 'run.cluster.queue'",
        ),
        (
            "{cluster: {kind: kubernetes, workers: 1, memory: 4GiB, image: i, volumes: {d: c}}}",
            "volumes: 'd' is no absolute path",
        ),
        (
            "{cluster: {kind: kubernetes, workers: 1, memory: 4GiB, image: i, env: {a b: c}}}",
            "env: 'a b' cannot name an environment variable",
        ),
    ],
)
def test_settings_without_effect_are_refused(setting, complaint):
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        load_config(PreprocessConfig, None, [f"run={setting}"])


@pytest.mark.parametrize(
    "address", ["tcp://a.b:8786", "a:1", "tls://[::1]:65535", "inproc://10.0.0.1/17/2"]
)
def test_a_scheduler_has_a_full_address(address):
    assert RunConfig(scheduler=address).scheduler == address


@pytest.mark.parametrize(
    "address",
    [
        "",
        "login-node",
        "tcp://login-node",
        ":1",
        "a:0",
        "a:65536",
        "a:b",
        "::1:1",
        "http://a:1",
        "a:1/",
    ],
)
def test_a_scheduler_without_one_is_refused_before_it_is_asked(address):
    with pytest.raises(ValueError, match=re.escape(f"10.0.0.1:8786, got {address!r}")):
        RunConfig(scheduler=address)


def test_local_workers_have_the_memory_and_threads_they_are_given():
    with client_of(RunConfig(workers=1, worker_memory="1.5GiB"), num_tasks=3) as client:
        (facts,) = client.scheduler_info(n_workers=-1)["workers"].values()
        (environment,) = client.run(lambda: dict(os.environ)).values()
    assert (facts["memory_limit"], facts["nthreads"]) == (1.5 * 2**30, 1)
    assert {**ENVIRONMENT, **MALLOC}.items() <= environment.items()


# Versions and files of workers elsewhere


@pytest.fixture(scope="module")
def dask(tmp_path_factory):
    with dask_processes(tmp_path_factory.mktemp("dask") / "processes") as started:
        yield started


@pytest.fixture(scope="module")
def other_version(tmp_path_factory):
    """A folder that makes another version of aptile out of this one."""
    folder = tmp_path_factory.mktemp("other")
    facts = folder / "aptile-9.9.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: aptile\nVersion: 9.9\n")
    return folder


def path_of(*folders: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(map(str, folders))}


def test_a_worker_of_another_version_is_named(dask, other_version):
    address = dask.scheduler()
    dask.worker(address, env=path_of(other_version, ROOT))
    with (
        pytest.raises(StoreError, match=r"^worker tcp://\S+ has aptile 9\.9, here it is [0-9.]+; "),
        client_of(RunConfig(scheduler=address), 1),
    ):
        pass


def test_a_worker_that_does_not_see_the_files_is_named(dask, tmp_path, monkeypatch):
    # Both processes look at the same path and see different folders, like hosts without a shared one.
    for place in ("here", "there"):
        (tmp_path / place / "store").mkdir(parents=True)
    (tmp_path / "here" / "archive").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("pipeline.jobs.hosts._SEEN_WITHIN_S", 0.5)
    address = dask.scheduler()
    dask.worker(address, env=path_of(ROOT), cwd=tmp_path / "there")
    seen, unseen = "/proc/self/cwd/store", "/proc/self/cwd/archive"
    asked = RunConfig(scheduler=address)
    with (
        pytest.raises(StoreError, match=rf"^worker tcp://\S+ does not see {unseen}; give a path"),
        client_of(asked, 1, reads=["s3://bucket/archive", unseen]),
    ):
        pass
    with (
        pytest.raises(StoreError, match=rf"does not see {seen} as it is here; give a path that"),
        client_of(asked, 1, seen),
    ):
        pass
    shared = str(tmp_path / "here" / "store")
    with client_of(asked, 1, shared, reads=[str(tmp_path / "here" / "archive")]) as client:
        assert client.submit(os.getcwd).result() == str(tmp_path / "there")
        client.submit(require_seen, (shared, seen)).result()
        with pytest.raises(
            StoreError, match=rf"^worker tcp://\S+ does not see {unseen}; give a path"
        ):
            client.submit(require_seen, local_paths(["https://a/b", shared, unseen])).result()
    assert not list(Path(shared).iterdir())


def test_a_scheduler_without_workers_is_waited_for_and_then_named(dask, monkeypatch, caplog):
    monkeypatch.setattr(clients, "_FIRST_WORKER_S", 0.2)
    address = dask.scheduler()
    with (
        pytest.raises(StoreError, match=f"run.scheduler {address}: no worker came within 0.2 s; "),
        client_of(RunConfig(scheduler=address), 1),
    ):
        pass
    assert "waiting up to 0.2 s for the first worker: `dask worker tcp" in caplog.text


# TLS


def openssl(*words: object) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    """A throw-away authority (ca.pem), what it signed (cert.pem, key.pem), and a stranger's pair."""
    folder = tmp_path_factory.mktemp("tls")
    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("ca", "stranger"):
        openssl(
            "req", "-x509", *new_key, "-days", 2, "-subj", f"/CN={name}",
            "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem",
        )  # fmt: skip
    openssl(
        "req", *new_key, "-subj", "/CN=aptile", "-keyout", folder / "key.pem",
        "-out", folder / "request.pem",
    )  # fmt: skip
    openssl(
        "x509", "-req", "-in", folder / "request.pem", "-CA", folder / "ca.pem",
        "-CAkey", folder / "ca.key", "-set_serial", 1, "-days", 2, "-out", folder / "cert.pem",
    )  # fmt: skip
    return folder


def tls_of(folder: Path, cert: str = "cert.pem", key: str = "key.pem", ca: str = "ca.pem"):
    return TlsConfig(
        ca_file=str(folder / ca), cert_file=str(folder / cert), key_file=str(folder / key)
    )


@pytest.fixture(scope="module")
def tls_scheduler(dask, certificates):
    """Address of a scheduler with one worker, both of which speak TLS only."""
    files = tls_of(certificates)
    flags = (
        "--tls-ca-file",
        files.ca_file,
        "--tls-cert",
        files.cert_file,
        "--tls-key",
        files.key_file,
    )
    address = dask.scheduler("--protocol", "tls", *flags)
    dask.worker(address, *flags)
    return address


def test_a_job_over_tls_gives_the_same_bytes(tls_scheduler, certificates, archive, store, tmp_path):
    assert tls_scheduler.startswith("tls://")
    files = tls_of(certificates)
    given = [f"run.tls.{key}={value}" for key, value in files]
    run(archive, tmp_path / "store", f"run.scheduler={tls_scheduler}", *given)
    assert_same_bytes(store, tmp_path / "store")


@pytest.mark.parametrize("shown", ["nothing", "a stranger's", "plain tcp"])
def test_a_client_without_the_right_certificate_is_refused(
    tls_scheduler, certificates, shown, monkeypatch
):
    monkeypatch.setattr(clients, "_CONNECT_S", 2)
    stranger = tls_of(certificates, "stranger.pem", "stranger.key")
    address = tls_scheduler.replace("tls", "tcp") if shown == "plain tcp" else tls_scheduler
    asked = RunConfig(scheduler=address, tls=stranger if shown == "a stranger's" else None)
    advice = {
        "nothing": "or give run.tls the certificates it asks for",
        "a stranger's": "or check run.tls",
        "plain tcp": "or leave the option out",
    }
    others = living_clients()
    with pytest.raises(StoreError, match=advice[shown]) as caught, client_of(asked, 1):
        pass
    # Frames of the traceback hold the client, which must not wait to be collected.
    assert caught.tb is not None
    left = [client for client in living_clients() if client not in others]
    assert {client.status for client in left} == {"closed"}


def living_clients() -> list[Client]:
    return [found for found in gc.get_objects() if issubclass(type(found), Client)]


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"ca": "absent.pem"}, "run.tls.ca_file /.*absent.pem: cannot be read: No such file"),
        ({"ca": "key.pem"}, "run.tls.ca_file /.*key.pem: holds no certificate"),
        ({"cert": "request.pem"}, "run.tls.cert_file /.*request.pem: cannot be used with"),
        (
            {"key": "ca.key"},
            r"cannot be used with run.tls.key_file .*ca.key \(key values mismatch\)",
        ),
    ],
)
def test_certificate_files_are_checked_in_words(certificates, files, complaint):
    with pytest.raises(StoreError, match=complaint):
        security_of(tls_of(certificates, **files))
