"""Workers on batch queues and Kubernetes: what is asked for, and what comes of it."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from one_scene import archive_in, run, settings
from pipeline.errors import StoreError
from pipeline.jobs.clients import client_of
from pipeline.jobs.job import run_job
from pipeline.jobs.process import ENVIRONMENT, MALLOC
from pipeline.jobs.queues import batch_cluster, cluster_of, cluster_spec
from pipeline.settings.cluster import (
    BatchConfig,
    ClusterConfig,
    KubernetesConfig,
    LsfConfig,
    PbsConfig,
    SlurmConfig,
)
from pipeline.settings.run import RunConfig
from support import Watching, assert_same_bytes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return archive_in(tmp_path_factory.mktemp("archive"))


@pytest.fixture(scope="module")
def store(archive, tmp_path_factory):
    """The archive preprocessed by one local worker."""
    path = tmp_path_factory.mktemp("store") / "local"
    run(archive, path, "run.workers=1")
    return path


def described(model: type[ClusterConfig]) -> list[str]:
    """Rows of the configuration page on one kind of cluster."""
    return [
        f"| `run.cluster.{name}` | {'required' if field.is_required() else field.default} | "
        f"{field.description} |"
        for name, field in model.model_fields.items()
    ]


@pytest.mark.parametrize("model", [SlurmConfig, PbsConfig, LsfConfig, KubernetesConfig])
def test_the_configuration_page_lists_every_cluster_setting(model):
    kind = model.model_fields["kind"].annotation.__args__[0]
    page = (ROOT / "docs" / "configuration.md").read_text()
    heading = "### Kubernetes" if kind == "kubernetes" else "### Batch queues"
    listed = page.split(heading)[1].split("\n##")[0]
    for row in described(model):
        assert row in listed


GOLDEN = {
    "slurm": """\
        #SBATCH -J aptile
        #SBATCH -p short
        #SBATCH -A forests
        #SBATCH -n 1
        #SBATCH --cpus-per-task=4
        #SBATCH --mem=16G
        #SBATCH -t 01:30:00
        #SBATCH --constraint=fast
    """,
    "pbs": """\
        #PBS -N aptile
        #PBS -q short
        #PBS -A forests
        #PBS -l select=1:ncpus=4:mem=16GB
        #PBS -l walltime=01:30:00
        #PBS --constraint=fast
    """,
    "lsf": """\
        #BSUB -J aptile
        #BSUB -q short
        #BSUB -P "forests"
        #BSUB -n 4
        #BSUB -R "span[hosts=1]"
        #BSUB -M 17179870
        #BSUB -W 01:30
        #BSUB --constraint=fast
    """,
}


WORKER = (
    "/opt/python -m distributed.cli.dask_worker tcp://SCHEDULER --name dummy-name --nthreads 1 "
    "--memory-limit 4.00GiB --nworkers 4 --nanny --death-timeout 60 --local-directory /scratch "
    "--interface lo"
)


def batch_config(kind: str, **more) -> BatchConfig:
    paid = {"project" if kind == "lsf" else "account": "forests"}
    content = {
        "kind": kind, "jobs": 2, "cores": 4, "memory": "16GiB", "queue": "short", "interface": "lo",
        "walltime": "01:30" if kind == "lsf" else "01:30:00", "local_directory": "/scratch",
        "directives": ["--constraint=fast"], "commands": ["module load gdal"],
        "python": "/opt/python", **paid, **more,
    }  # fmt: skip
    return RunConfig.model_validate({"cluster": content}).cluster


def need(package: str) -> None:
    """Skip without the package; imported it would change what Ctrl-C does to the tests."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize("kind", list(GOLDEN))
def test_job_scripts_say_what_was_configured(kind):
    need("dask_jobqueue")
    with batch_cluster(batch_config(kind)) as cluster:
        lines = re.sub(r"tcp://\S+", "tcp://SCHEDULER", cluster.job_script()).splitlines()
        worker_ttl = cluster.scheduler.worker_ttl
    exports = [f"export {name}={value}" for name, value in {**ENVIRONMENT, **MALLOC}.items()]
    expected = [line.strip() for line in GOLDEN[kind].strip().splitlines()]
    assert [line for line in lines if line] == [
        "#!/usr/bin/env bash", *expected, *exports, "module load gdal", WORKER,
    ]  # fmt: skip
    assert worker_ttl == 60


def test_interrupts_stay_what_they_are():
    need("dask_jobqueue")
    need("dask_kubernetes")
    code = (
        "import signal; before = signal.getsignal(signal.SIGINT)\n"
        "from pipeline.jobs.queues import _package\n"
        "_package('dask_jobqueue', 'slurm'); _package('dask_kubernetes.operator', 'kubernetes')\n"
        "assert signal.getsignal(signal.SIGINT) is before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


FAKE_QUEUE = {
    "sbatch": """\
        #!/bin/sh
        # A queue of one machine: the job runs at once, its process group is its number.
        spooled=$(mktemp)
        cp "$1" "$spooled"
        setsid sh "$spooled" >"$spooled.log" 2>&1 </dev/null &
        echo "Submitted batch job $!"
    """,
    "scancel": '#!/bin/sh\nkill -9 -- "-$1"\n',
    "squeue": '#!/bin/sh\necho "$3 PENDING Priority"\n',
}


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """The commands of a queue that runs jobs on this machine."""
    need("dask_jobqueue")
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in FAKE_QUEUE.items():
        (folder / name).write_text("\n".join(line.strip() for line in text.splitlines()) + "\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def on_one_machine(**more) -> SlurmConfig:
    return batch_config(
        "slurm", python=sys.executable, **{"commands": [], "local_directory": None, **more}
    )


def test_a_job_on_a_queue_gives_the_same_bytes(queue, archive, store, tmp_path):
    config = on_one_machine(jobs=1, cores=2, memory="2GiB", local_directory=str(tmp_path))
    asked = settings().model_copy(update={"run": RunConfig(cluster=config)})
    run_job(str(archive), tmp_path / "store", asked, Watching())
    assert_same_bytes(store, tmp_path / "store")


def test_a_queue_without_free_nodes_is_asked_what_it_waits_for(queue, caplog):
    (queue / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 17\n")
    complaint = (
        r"^run\.cluster: no worker came within 0\.2 s of slurm jobs 17, 17; the queue says: "
        r"--jobs PENDING Priority; raise run\.cluster\.wait_s"
    )
    with (
        pytest.raises(StoreError, match=complaint),
        client_of(RunConfig(cluster=on_one_machine(wait_s=0.2)), 1),
    ):
        pass
    assert re.search(
        r"waiting up to 0.2 s for the first worker: slurm jobs 17, 17$", caplog.text, re.M
    )


def test_a_job_the_queue_refuses_is_reported(queue):
    (queue / "sbatch").write_text("#!/bin/sh\necho invalid account forests >&2\nexit 1\n")
    with (
        pytest.raises(StoreError, match=r"the queue refused a job \(.*invalid account forests"),
        client_of(RunConfig(cluster=on_one_machine()), 1),
    ):
        pass


def test_without_the_queue_or_its_package_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(StoreError, match="there is no command sbatch here; run aptile where"),
        cluster_of(on_one_machine(), None),
    ):
        pass
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(
        StoreError, match=r"slurm needs dask_jobqueue; .*pip install 'aptile\[hpc\]'"
    ):
        batch_cluster(on_one_machine())


PODS = KubernetesConfig(
    kind="kubernetes",
    workers=7,
    memory="4GiB",
    image="registry.example/aptile:1",
    volumes={"/data": "archive-claim"},
    env={"AWS_REGION": "eu-central-1"},
)


def test_pods_are_what_was_configured():
    need("dask_kubernetes")
    spec = cluster_spec(PODS, "aptile-1")["spec"]
    worker, (container,) = spec["worker"], spec["worker"]["spec"]["containers"]
    assert worker["replicas"] == 7
    assert container["image"] == spec["scheduler"]["spec"]["containers"][0]["image"] == PODS.image
    assert container["args"][:4] == ["dask", "worker", "--nthreads", "1"]
    amounts = {"cpu": "1", "memory": str(4 * 2**30)}
    assert container["resources"] == {"requests": amounts, "limits": amounts}
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment == {
        **ENVIRONMENT,
        **MALLOC,
        "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "60s",
        "AWS_REGION": "eu-central-1",
    }
    (mount,), (volume,) = container["volumeMounts"], worker["spec"]["volumes"]
    assert mount == {"name": volume["name"], "mountPath": "/data"}
    assert volume["persistentVolumeClaim"] == {"claimName": "archive-claim"}


def test_a_kubernetes_cluster_out_of_reach_is_reported(tmp_path, monkeypatch):
    need("dask_kubernetes")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with (
        pytest.raises(StoreError, match="kubernetes: no cluster could be made .*credentials"),
        client_of(RunConfig(cluster=PODS), 1),
    ):
        pass


def test_without_the_package_of_kubernetes_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dask_kubernetes", None)
    monkeypatch.delitem(sys.modules, "dask_kubernetes.operator", raising=False)
    with pytest.raises(StoreError, match=r"kubernetes needs dask_kubernetes.*'aptile\[hpc\]'"):
        cluster_spec(PODS, "aptile-1")


def test_local_workers_that_die_at_once_are_reported(monkeypatch):
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("Nanny failed to start.")

    monkeypatch.setattr("pipeline.jobs.clients.LocalCluster", failing)
    with (
        pytest.raises(StoreError, match="2 local worker processes did not start.*same command"),
        client_of(RunConfig(workers=2), 2),
    ):
        pass
