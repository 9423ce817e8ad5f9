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


"""Parsl sites that give each job on a GPU a device of its own.

A workflow of ``bps submit`` may need GPUs for some of its jobs only.  These
sites have two executors: one runs jobs on CPU cores and hides the GPUs from
them, the other has one worker for each GPU, which sees that GPU alone.  The
value ``gpuTasks`` of the site says which jobs go to the GPUs.
"""

from __future__ import annotations

__all__ = ("LocalGpu", "SlurmGpu")

import abc
import copy
import logging
import os
import re
from typing import TYPE_CHECKING, Any

try:
    from parsl.executors import HighThroughputExecutor
    from parsl.providers import LocalProvider

    from lsst.ctrl.bps import BpsConfig
    from lsst.ctrl.bps.parsl.configuration import get_bps_config_value
    from lsst.ctrl.bps.parsl.site import SiteConfig
    from lsst.ctrl.bps.parsl.sites import Slurm
except ImportError as err:
    raise ImportError(
        "lsst.meas.deeplearn.parsl needs Parsl and lsst.ctrl.bps.parsl; install them with "
        "'pip install meas-deeplearn[parsl]'."
    ) from err

if TYPE_CHECKING:
    from parsl.executors.base import ParslExecutor

    from lsst.ctrl.bps.parsl.job import ParslJob

_LOG = logging.getLogger(__name__)

CPU = "cpu"
"""Label of the executor of jobs without a GPU."""

GPU = "gpu"
"""Label of the executor of jobs with a GPU."""

# An empty list of devices, which is not the same as none being listed.
_HIDE_GPUS = "export CUDA_VISIBLE_DEVICES="

# Parsl starts no more workers than cores divided by this.  The number of
# workers is configured here, and theirs is the choice to share cores.
_CORES_PER_WORKER = 1e-3

_TELL_DEVICES = 'echo "Job on $(hostname), CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-not set}" >&2'

# A job outlives a worker that is killed (and may stay a zombie), and would
# share the GPU, and write the same files, with its own second try.  The shell
# of the job may have become the job, or have it as its youngest child.
_END_WITH_WORKER = """\
(while kill -0 $$; do
    ps -o stat= -p $PPID | grep -q "^[^Z]" || kill -KILL $$ $(pgrep -P $$ | sort -rn)
    sleep 2
done) >/dev/null 2>&1 </dev/null &"""

# Parsl's workers outlive a submission that is killed, and would go on while
# it is restarted.  They and their jobs are a group of processes.
_END_WITH_SUBMISSION = """(while kill -0 {pid}; do
    sleep 2
done
kill -KILL -- -$(ps -o pgid= -p $$ | tr -d " ")) >/dev/null 2>&1 </dev/null &"""


class GpuSite(SiteConfig, abc.ABC):
    """A site with an executor for CPUs and one for GPUs.

    Without GPUs, all jobs run on CPUs.

    Parameters
    ----------
    config
        Configuration of the submission; see `LocalGpu` and `SlurmGpu` for
        the values of the site.
    resource_list
        Resources of a job that the executors are told.

    Raises
    ------
    ValueError
        Raised if the configuration of the site is wrong.
    """

    def __init__(self, config: BpsConfig, resource_list: list[str] | None = None) -> None:
        # The executors know no other resource.
        super().__init__(config, resource_list=resource_list or ["priority"])
        self.gpus = self._parse_gpus()
        self.gpu_tasks = frozenset(_split(self._get("gpuTasks", str, "")))
        if self.gpus and not self.gpu_tasks:
            raise self._make_error(
                "has gpus, but no gpuTasks; name the tasks or clusters whose jobs need a GPU, such as "
                "'gpuTasks: lensFinder'"
            )
        self._told: set[str] = set()

    def get_executors(self) -> list[ParslExecutor]:
        """Return the executor of CPUs and, if there are any, that of GPUs."""
        executors = [self.make_cpu_executor()]
        if self.gpus:
            executors.append(self.make_gpu_executor())
        return executors

    @abc.abstractmethod
    def make_cpu_executor(self) -> ParslExecutor:
        """Return the executor of jobs that need no GPU."""

    @abc.abstractmethod
    def make_gpu_executor(self) -> ParslExecutor:
        """Return the executor with a worker for each GPU."""

    def select_executor(self, job: ParslJob) -> str:
        """Return the label of the executor that runs a job.

        Parameters
        ----------
        job
            The job; it goes to the GPUs if ``gpuTasks`` has its label or one
            of the tasks in its cluster.
        """
        names = {job.generic.label, *job.generic.quanta_counts}
        label = GPU if self.gpus and names & self.gpu_tasks else CPU
        if job.generic.label not in self._told:
            self._told.add(job.generic.label)
            _LOG.info("Jobs of %s run on executor %s.", job.generic.label, label)
        return label

    def get_command_prefix(self) -> str:
        """Return the commands before each job.

        These are ``commandPrefix`` of the site, one that writes the GPU of
        the job to its log, and one that ends the job with its worker.
        """
        prefix = self._get("commandPrefix", str, "")
        return f"{prefix.rstrip()}\n{_TELL_DEVICES}\n{_END_WITH_WORKER}".lstrip()

    def _parse_gpus(self) -> list[str]:
        """Return the devices of a node, as CUDA_VISIBLE_DEVICES has them."""
        value = self._get("gpus", object, 0)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return [str(n) for n in range(value)]
        if isinstance(value, str | list):
            devices = _split(value) if isinstance(value, str) else [str(device) for device in value]
            if devices and len(set(devices)) == len(devices):
                return devices
        raise self._make_error(
            f"has gpus {value!r}; give their number, such as 2, or their devices, such as '0, 3'"
        )

    def _get(self, key: str, kind: type, default: Any = None) -> Any:
        """Return a value of the site, checked for its type."""
        try:
            return get_bps_config_value(self.site, key, kind, default)
        except RuntimeError as err:
            raise self._make_error(f"has a wrong {key}: {err}") from err

    def _get_count(self, key: str) -> int:
        """Return a value of the site that is a number of something."""
        value = self._get(key, object)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            given = f"has {key} {value!r}" if value not in (None, "") else f"lacks {key}"
            raise self._make_error(f"{given}; give a whole number from 1")
        return value

    def _make_error(self, message: str) -> ValueError:
        site = self.config["computeSite"]
        return ValueError(f"Site {site!r} of the BPS configuration {message}.")


class LocalGpu(GpuSite):
    """The machine itself, with workers for CPUs and a worker for each GPU.

    The workers inherit the environment of ``bps submit``, and end with it.

    Parameters
    ----------
    config
        Configuration of the submission.

    Notes
    -----
    Values of the site:

    - ``cores``: number of jobs that run at once without a GPU.
    - ``gpus``: number of GPUs, or a list of devices such as ``"0, 3"``, as
      ``CUDA_VISIBLE_DEVICES`` has them; 0 by default.
    - ``gpuTasks``: tasks or clusters whose jobs get a GPU each, separated by
      commas or blanks.
    - ``commandPrefix``, ``retries``, ``run_dir``, ``monitorEnable`` and so
      on: as for all sites of ctrl_bps_parsl.

    Jobs on GPUs run beside those on CPUs.
    """

    def make_cpu_executor(self) -> ParslExecutor:
        return HighThroughputExecutor(
            CPU,
            address=self.get_address(),
            provider=self._make_provider(_HIDE_GPUS),
            max_workers_per_node=self._get_count("cores"),
            cores_per_worker=_CORES_PER_WORKER,
        )

    def make_gpu_executor(self) -> ParslExecutor:
        return HighThroughputExecutor(
            GPU,
            address=self.get_address(),
            provider=self._make_provider(),
            available_accelerators=self.gpus,
            cores_per_worker=_CORES_PER_WORKER,
        )

    def _make_provider(self, worker_init: str = "") -> LocalProvider:
        end = _END_WITH_SUBMISSION.format(pid=os.getpid())
        return LocalProvider(init_blocks=1, max_blocks=1, worker_init=f"{worker_init}\n{end}".lstrip())

    def get_address(self) -> str:
        """Return where workers find the submission: on this machine."""
        return "127.0.0.1"


class SlurmGpu(GpuSite, Slurm):
    """A Slurm cluster, with nodes for CPUs and nodes for GPUs.

    Parameters
    ----------
    config
        Configuration of the submission.

    Notes
    -----
    Values of the site are those of `lsst.ctrl.bps.parsl.sites.Slurm`
    (``nodes``, ``walltime``, ``account``, ``qos``, ``constraint``,
    ``cores_per_node``, ``mem_per_node``, ``scheduler_options`` and so on),
    ``partition``, ``exclusive`` (as Parsl has it, nodes are not shared by
    default), ``max_blocks`` (Slurm jobs of one kind at a time, 1 by
    default), and

    - ``gpus``: number of GPUs of a node, or a list of its devices; 0 by
      default.
    - ``gpuTasks``: tasks or clusters whose jobs get a GPU each, separated by
      commas or blanks.
    - ``gpu``: a section with other values of the above for the nodes with
      GPUs.  They are asked for with ``--gpus-per-node``, or with ``gres`` if
      that is given.

    Each kind of node is a Slurm job of its own, which is asked for when jobs
    of that kind are ready.
    """

    def make_cpu_executor(self) -> ParslExecutor:
        return self._make_nodes_executor(CPU, {"worker_init": _HIDE_GPUS}, {})

    def make_gpu_executor(self) -> ParslExecutor:
        nodes = copy.copy(self)
        nodes.site = copy.deepcopy(self.site)
        nodes.site.update(self._get("gpu", BpsConfig, {}))
        workers = {"available_accelerators": self.gpus, "cores_per_worker": _CORES_PER_WORKER}
        return nodes._make_nodes_executor(GPU, {"gpus_per_node": len(self.gpus)}, workers)

    def _make_nodes_executor(
        self, label: str, nodes: dict[str, Any], workers: dict[str, Any]
    ) -> ParslExecutor:
        """Return an executor for nodes of one kind."""
        for key, kind in (("partition", str), ("gres", str), ("exclusive", bool), ("max_blocks", int)):
            if (value := self._get(key, kind)) is not None:
                nodes[key] = value
        if "gres" in nodes:
            nodes.pop("gpus_per_node", None)
        self._get_count("nodes")
        return self.make_executor(
            label, provider_options={"init_blocks": 0, **nodes}, executor_options=workers
        )


def _split(names: str) -> list[str]:
    """Return names that commas or blanks separate."""
    return [name for name in re.split(r"[,\s]+", names) if name]
