# This file is part of meas_deeplearn.
#
# Developed for the LSST Data Management System.
# This product includes software developed by the LSST Project
# (https://www.lsst.org).
# See the COPYRIGHT file at the top-level directory of this distribution
# for details of code ownership.
#
# This program is free software: you can redistribute it and/or modify
# it under the terms of the GNU General Public License as published by
# the Free Software Foundation, either version 3 of the License, or
# (at your option) any later version.
#
# This program is distributed in the hope that it will be useful,
# but WITHOUT ANY WARRANTY; without even the implied warranty of
# MERCHANTABILITY or FITNESS FOR A PARTICULAR PURPOSE.  See the
# GNU General Public License for more details.
#
# You should have received a copy of the GNU General Public License
# along with this program.  If not, see <https://www.gnu.org/licenses/>.


from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lsst.daf.butler import Butler
from lsst.meas.deeplearn.model_package import ingest_model
from lsst.meas.deeplearn.tests import make_test_model, make_test_repository

pytest.importorskip("lsst.ctrl.bps.parsl")
import psutil

from lsst.ctrl.bps import BpsConfig
from lsst.meas.deeplearn.parsl.sites import GpuSite, LocalGpu, SlurmGpu

BPS = Path(__file__).resolve().parents[1] / "bps"


def make_site(site_class: type[GpuSite] = LocalGpu, **values: Any) -> GpuSite:
    """Make a site with some values in the configuration."""
    return site_class(
        BpsConfig(
            {
                "computeSite": "here",
                "project": "test",
                "operator": "me",
                "site": {"here": {"cores": 2, "nodes": 1, "walltime": "01:00:00", **values}},
            }
        )
    )


def make_job(label: str, **quanta_counts: int) -> Any:
    """Make a job of a cluster."""
    return SimpleNamespace(generic=SimpleNamespace(label=label, quanta_counts=quanta_counts or {label: 1}))


@pytest.mark.parametrize(
    ("gpus", "devices"),
    [(2, ["0", "1"]), ("0, 3", ["0", "3"]), ([0, 3], ["0", "3"]), ("GPU-1 GPU-2", ["GPU-1", "GPU-2"])],
)
def test_one_worker_for_each_gpu(gpus: object, devices: list[str]) -> None:
    """GPUs are given by their number or by their names."""
    cpu, gpu = make_site(gpus=gpus, gpuTasks="lensFinder").get_executors()
    assert (cpu.label, gpu.label) == ("cpu", "gpu")
    assert gpu.available_accelerators == devices
    assert not cpu.available_accelerators
    assert cpu.max_workers_per_node == 2


def test_jobs_without_gpu_do_not_see_one() -> None:
    """The workers for CPUs have no devices."""
    cpu, gpu = make_site(gpus=1, gpuTasks="lensFinder").get_executors()
    assert "export CUDA_VISIBLE_DEVICES=\n" in cpu.provider.worker_init
    assert "CUDA" not in gpu.provider.worker_init


def test_no_gpu() -> None:
    """Without GPUs there is one executor, which runs everything."""
    site = make_site(gpuTasks="lensFinder")
    assert [executor.label for executor in site.get_executors()] == ["cpu"]
    assert site.select_executor(make_job("lensFinder")) == "cpu"


@pytest.mark.parametrize("names", ["lensFinder", "other, lensFinder", "scorePatches other"])
def test_tasks_and_clusters_are_routed(names: str, caplog: pytest.LogCaptureFixture) -> None:
    """A job goes to the GPUs for its label or for a task in its cluster, and
    the log says so once.
    """
    site = make_site(gpus=1, gpuTasks=names)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert site.select_executor(make_job("scorePatches", lensFinder=25)) == "gpu"
        assert site.select_executor(make_job("rankLensCandidates")) == "cpu"
    assert caplog.messages == [
        "Jobs of scorePatches run on executor gpu.",
        "Jobs of rankLensCandidates run on executor cpu.",
    ]


@pytest.mark.parametrize("command", ["exec {}", "trap : EXIT; {}; true"], ids=["same", "child"])
def test_job_ends_with_its_worker(command: str, tmp_path: Path) -> None:
    """A job is killed soon after its worker, whether it has taken the place
    of the shell or not.
    """
    words = ["sleep", f"60.{os.getpid()}"]
    script = tmp_path / "job.sh"
    script.write_text(f"{make_site().get_command_prefix()}\n{command.format(' '.join(words))}\n")
    worker = subprocess.Popen(["bash", "-c", f"bash {script}; true"], stderr=subprocess.DEVNULL)
    jobs: list[psutil.Process] = []
    while not jobs and worker.poll() is None:
        time.sleep(0.1)
        jobs = [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] == words]
    worker.kill()  # It is a zombie until the next wait.
    assert not psutil.wait_procs(jobs, timeout=60)[1]
    worker.wait()


def test_command_prefix() -> None:
    """The prefix of the user comes first."""
    prefix = make_site(commandPrefix="setup meas_deeplearn\n").get_command_prefix()
    assert prefix.startswith("setup meas_deeplearn\necho")
    assert "CUDA_VISIBLE_DEVICES" in prefix


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gpus": 2}, "has gpus, but no gpuTasks"),
        ({"gpus": -1}, "has gpus -1; give their number"),
        ({"gpus": True}, "has gpus True"),
        ({"gpus": ""}, "has gpus ''"),
        ({"gpus": "0, 0"}, "has gpus '0, 0'"),
        ({"gpus": 1, "gpuTasks": 3}, "has a wrong gpuTasks"),
        ({"cores": 0}, "has cores 0; give a whole number from 1"),
        ({"cores": "two"}, "has cores 'two'"),
        ({"cores": None}, "lacks cores"),
    ],
)
def test_wrong_values(values: dict[str, Any], message: str) -> None:
    """Wrong values are refused, with the site and the cure."""
    with pytest.raises(ValueError, match=f"Site 'here' of the BPS configuration {message}"):
        make_site(**values).get_executors()


def test_slurm_nodes() -> None:
    """Nodes of each kind are asked for with values of their own."""
    cpu, gpu = make_site(
        SlurmGpu, gpus=4, gpuTasks="lensFinder", partition="cpus", gpu={"partition": "gpus", "account": "me"}
    ).get_executors()
    assert "--partition=cpus" in cpu.provider.scheduler_options
    assert "gpus" not in cpu.provider.scheduler_options
    assert cpu.provider.account is None
    assert "--partition=gpus" in gpu.provider.scheduler_options
    assert "--gpus-per-node=4" in gpu.provider.scheduler_options
    assert gpu.provider.account == "me"
    assert gpu.available_accelerators == ["0", "1", "2", "3"]
    assert cpu.provider.init_blocks == gpu.provider.init_blocks == 0


def test_slurm_gres() -> None:
    """A cluster that wants --gres gets no --gpus-per-node."""
    _, gpu = make_site(
        SlurmGpu, gpus=4, gpuTasks="lensFinder", exclusive=False, gpu={"gres": "gpu:h200:4"}
    ).get_executors()
    assert "--gres=gpu:h200:4" in gpu.provider.scheduler_options
    assert "--gpus-per-node" not in gpu.provider.scheduler_options
    assert "--exclusive" not in gpu.provider.scheduler_options


def test_missing_parsl() -> None:
    """Without Parsl the error says what to install."""
    code = "import sys; sys.modules['parsl'] = None; import lsst.meas.deeplearn.parsl.sites"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install meas-deeplearn[parsl]" in process.stderr


@pytest.mark.parametrize("path", sorted(BPS.glob("*.yaml")), ids=lambda path: path.name)
def test_submissions_are_complete(path: Path) -> None:
    """Each YAML scores the patches of a tract together, and its site is
    what it says.
    """
    config = BpsConfig(str(path))
    config["operator"] = "me"
    assert config["pipelineYaml"].startswith("eups://meas_deeplearn/pipelines/")
    assert config["clusterAlgorithm"].endswith("dimension_clustering")
    assert config[".cluster.scorePatches.pipetasks"] == "lensFinder"
    assert config[".cluster.scorePatches.dimensions"] == "skymap, tract"
    if config["wmsServiceClass"] == "lsst.ctrl.bps.parsl.ParslService":
        site = GpuSite.from_config(config)
        assert site.get_executors()
        assert site.gpu_tasks == {"lensFinder"}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a repository of six small patches and a model."""
    root = tmp_path_factory.mktemp("repository") / "repo"
    butler = make_test_repository(root, n_patches=(2, 3), n_sources=80)
    ingest_model(butler, make_test_model(), run="models/deeplens/v1", dataset_type="deeplens_model")
    return root


def start_bps(folder: Path, *command: str, path: str = "") -> subprocess.Popen[bytes]:
    """Start bps in a folder, in an environment like an activated one."""
    environment = dict(os.environ, USER="me", LOGNAME="me", PWD=str(folder))
    programs = Path(sys.executable).parent
    environment["PATH"] = f"{path}{programs}{os.pathsep}{environment['PATH']}"
    with open(folder / "bps.log", "ab") as log:
        return subprocess.Popen(
            [programs / "bps", *command], cwd=folder, env=environment, stdout=log, stderr=log
        )


def start_submission(folder: Path, repository: Path, config: str, output: str, **kwargs: str) -> Any:
    """Start `bps submit` of the lens finder on the repository."""
    (folder / "submission.yaml").write_text(config)
    return start_bps(
        folder,
        *("submit", "submission.yaml", "-b", str(repository), "-i", "test/coadds,models/deeplens/v1"),
        *("-o", output, "-d", "skymap='test' AND tract=0"),
        # The objects of the test repository are stars.
        *("--extra-qgraph-options", "-c \"lensFinder:selection=['i_psfFlux > 0']\""),
        **kwargs,
    )


def wait_for_job(folder: Path, submission: subprocess.Popen[bytes], text: str) -> Path:
    """Return the log of the first job that has written a line that begins
    with a text.
    """
    while submission.poll() is None:
        for log in folder.glob("*/logs/scorePatches/*/*.stderr"):
            if re.search(f"^{text}", log.read_text(), re.MULTILINE):
                return log
        time.sleep(0.5)
    raise AssertionError("bps has ended; see its log.")


def get_files(repository: Path, name: str, collection: str) -> dict[int, tuple[Path, int]]:
    """Return file and time of change of the datasets of each patch."""
    butler = Butler.from_config(str(repository))
    files = {}
    for ref in butler.query_datasets(name, collection, explain=False):
        file = Path(butler.getURI(ref).ospath)
        files[int(ref.dataId.get("patch", -1))] = (file, file.stat().st_mtime_ns)
    return files


@pytest.mark.slow
def test_killed_worker_and_restart(repository: Path, tmp_path: Path) -> None:
    """Jobs are pinned to GPUs; after a worker was killed, `bps restart` runs
    what is missing, and nothing else.
    """
    config = f"""
        includeConfigs: {BPS}/laptop.yaml
        site: {{laptop: {{gpus: 2, retries: 0}}}}
        cluster: {{scorePatches: {{partitionMaxSize: 3}}}}
    """
    submission = start_submission(tmp_path, repository, config, "lenses/killed")
    log = wait_for_job(tmp_path / "submit/lenses/killed", submission, "Job on")
    device = _read_device(log)
    job = next(
        process
        for process in psutil.process_iter(["cmdline", "environ"])
        if "run-qbb" in (command := process.info["cmdline"] or [])
        and any(str(tmp_path) in word for word in command)
        and process.info["environ"]["CUDA_VISIBLE_DEVICES"] == device
    )
    while "Executed 1 quanta" not in log.read_text():
        time.sleep(0.1)
    job.suspend()
    assert "Executed 3 quanta" not in log.read_text()
    worker = next(process for process in job.parents() if "--multiprocessing-fork" in process.cmdline())
    worker.kill()
    assert not psutil.wait_procs([job], timeout=60)[1], "The job has outlived its worker."
    assert submission.wait() == 0

    (folder,) = tmp_path.glob("submit/lenses/killed/*")
    jobs = sorted(folder.glob("logs/scorePatches/0/*.stderr"))
    assert {_read_device(log) for log in jobs} == {"0", "1"}
    before = get_files(repository, "lens_candidates", "lenses/killed")
    assert 0 < len(before) < 6
    assert not get_files(repository, "lens_candidates_ranked", "lenses/killed")

    service = "lsst.ctrl.bps.parsl.ParslService"
    restart = start_bps(tmp_path, "restart", "--wms-service-class", service, "--id", str(folder))
    assert restart.wait() == 0
    after = get_files(repository, "lens_candidates", "lenses/killed")
    assert set(after) == set(range(6))
    assert before.items() <= after.items()
    assert get_files(repository, "lens_candidates_ranked", "lenses/killed")
    assert {log.read_text().count("Job on") for log in jobs} == {2, 4}, "Only the lost job has run again."


@pytest.mark.slow
def test_killed_submission_and_restart(repository: Path, tmp_path: Path) -> None:
    """If `bps submit` itself is killed, its jobs end with it, and `bps
    restart` runs what is missing, and nothing else.
    """
    config = f"""
        includeConfigs: {BPS}/laptop.yaml
        site: {{laptop: {{gpus: 1, retries: 0}}}}
        cluster: {{scorePatches: {{partitionMaxSize: 3}}}}
    """
    submission = start_submission(tmp_path, repository, config, "lenses/submission")
    log = wait_for_job(tmp_path / "submit/lenses/submission", submission, "Job on")
    while "Executed 1 quanta" not in log.read_text():
        time.sleep(0.1)
    jobs = [
        process
        for process in psutil.process_iter(["cmdline"])
        if "run-qbb" in (command := process.info["cmdline"] or [])
        and any(str(tmp_path) in word for word in command)
    ]
    assert jobs
    children = psutil.Process(submission.pid).children(recursive=True)
    submission.kill()
    assert submission.wait() != 0
    assert not psutil.wait_procs(jobs, timeout=60)[1], "A job has outlived its submission."
    # The interchanges of Parsl stay behind, idle.
    for process in children:
        if process.is_running():
            process.kill()

    (folder,) = tmp_path.glob("submit/lenses/submission/*")
    logs = sorted(folder.glob("logs/scorePatches/0/*.stderr"))
    finished = sum(_count_finished(log) for log in logs)
    assert 0 < finished < 6
    service = "lsst.ctrl.bps.parsl.ParslService"
    restart = start_bps(tmp_path, "restart", "--wms-service-class", service, "--id", str(folder))
    assert restart.wait() == 0
    assert set(get_files(repository, "lens_candidates", "lenses/submission")) == set(range(6))
    assert get_files(repository, "lens_candidates_ranked", "lenses/submission")
    logs = sorted(folder.glob("logs/scorePatches/0/*.stderr"))
    assert sum(_count_finished(log) for log in logs) == 6, "A patch was scored twice, or never."


def _count_finished(log: Path) -> int:
    """Return how many patches the tries of a job have scored."""
    return log.read_text().count("Execution of task 'lensFinder'")


@pytest.mark.slow
def test_slurm_jobs(repository: Path, tmp_path: Path) -> None:
    """A Slurm, which is faked by running its batch scripts here, is asked for
    a node of each kind when there are jobs for it.
    """
    fakes = {
        "sbatch": "cp $1 batch$$.sh; setsid bash $1 >/dev/null 2>&1 </dev/null & echo Submitted batch job $!",
        "sacct": "exit 1",
        "squeue": 'for job in ${@: -1}; do ps -p ${job//,/ -p } -o pid=,state= | sed "s/ [^ ]*$/ R/"; done',
        "scancel": 'for job in "$@"; do kill -- -$job; done',
    }
    for name, script in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    config = f"""
        includeConfigs: {BPS}/slurm_gpu.yaml
        site: {{slurm: {{gpus: 2, partition: cpus, gpu: {{partition: gpus}}}}}}
        cluster: {{scorePatches: {{partitionMaxSize: 3, extraRunQuantumOptions: ""}}}}
    """
    submission = start_submission(
        tmp_path, repository, config, "lenses/slurm", path=f"{tmp_path}{os.pathsep}"
    )
    assert submission.wait() == 0
    assert set(get_files(repository, "lens_candidates", "lenses/slurm")) == set(range(6))
    assert get_files(repository, "lens_candidates_ranked", "lenses/slurm")
    jobs = tmp_path.glob("submit/lenses/slurm/*/logs/scorePatches/0/*.stderr")
    assert {_read_device(log) for log in jobs} == {"0", "1"}
    batches = [file.read_text() for file in tmp_path.glob("batch*.sh")]
    assert ["--gpus-per-node=2" in text for text in batches] == [
        "--partition=gpus" in text for text in batches
    ]
    assert {"--partition=gpus" in text for text in batches} == {True, False}


def _read_device(log: Path) -> str:
    """Return the GPU that the log of a job tells."""
    match = re.search(r"^Job on \S+, CUDA_VISIBLE_DEVICES=(.*)$", log.read_text(), re.MULTILINE)
    assert match
    return match[1]
