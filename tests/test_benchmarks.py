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


"""Tests that the benchmarks run, and of what is projected from them."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def survey_cost(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the module that projects the cost of a survey."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("survey_cost")


def test_survey_that_reads(survey_cost: ModuleType) -> None:
    """Where only reading costs, hours are pixels times the rate."""
    rates = survey_cost.Rates(read=0.1, quantum=0.0, cut=0.0, network=0.0, start_up=0.0, first=0.0)
    survey = survey_cost.Survey(area=100.0, border=0.0, patch_side=3000.0, n_bands=3)
    assert survey.n_patches == pytest.approx(100 * 36)
    hours, limit = survey_cost.compute_hours(survey, rates, n_cores=10)
    assert hours == pytest.approx(100 * 36 * 9 * 3 * 0.1 / 10 / 3600)
    assert limit == "reading"


def test_survey_on_a_gpu(survey_cost: ModuleType) -> None:
    """The slower of cores and GPU limits a survey."""
    rates = survey_cost.Rates(read=0.01, quantum=0.1, cut=1e-4, network=2e-3, start_up=5.0, first=1.0)
    survey = survey_cost.Survey()
    on_cores, limit = survey_cost.compute_hours(survey, rates, n_cores=64)
    on_gpu, _ = survey_cost.compute_hours(survey, rates, n_cores=64, n_gpus=1)
    assert on_gpu < on_cores
    assert survey_cost.compute_hours(survey, rates, n_cores=10**7, n_gpus=1)[1] == "network"
    assert limit in ("reading", "network", "overhead", "cutting")


def test_model_is_checked(survey_cost: ModuleType) -> None:
    """Times that follow the model are predicted, for small files too."""
    overhead, opening, read, cut, network = 0.1, 0.3, 0.05, 1e-3, 2e-3

    def compute_reading(side: int) -> float:
        return opening + read * 3 * side**2 / 1e6

    def make(benchmark: str, what: str, value: float) -> object:
        return survey_cost.Result(benchmark, what, value, "CPU s")

    results = [
        make("patch", "naive, 2100^2 x 3 bands, 1250 objects", 10.0),
        make("patch", "    read (50.0 %)", 5.0),
        make("patch", "openvino float32", 5.0),
        make("patch", "    read (50.0 %)", compute_reading(2100)),
        make("patch", "    cut (5.0 %)", 1250 * cut),
        make("patch", "    scale (0.0 %)", 0.0),
        make("patch", "    network (40.0 %)", 1250 * network),
        make("patch", "    other (0.0 %)", 0.0),
        make("start-up", "import of the task", 2.0),
        make("start-up", "import of torch", 2.0),
        make("scaling", "overhead of a quantum", overhead),
        make("scaling", "reading a patch of 900^2", compute_reading(900)),
    ]
    results.append(make("scaling", "patch, start of the straight line", 0.5))
    seconds = 0.5 + 4 * (overhead + compute_reading(900)) + 70 * (cut + network)
    results.append(make("scaling", "4 patch(es) of 900^2, 70 objects", seconds))
    (check,) = survey_cost.check(results)
    assert check.value == pytest.approx(1.0)
    assert survey_cost.find_rates(results).quantum == pytest.approx(overhead + opening)


def test_figures_are_needed(survey_cost: ModuleType) -> None:
    """Without figures the cure is said."""
    with pytest.raises(ValueError, match="run both"):
        survey_cost.project([])


@pytest.mark.slow
def test_quick_benchmarks(tmp_path: Path) -> None:
    """All figures come out of one command, as a table and as JSON."""
    path = tmp_path / "benchmarks.json"
    command = [sys.executable, str(FOLDER), "--quick", "--json", str(path), "network", "patch", "scaling"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    content = json.loads(path.read_text())
    assert {result["benchmark"] for result in content["results"]} >= {"network", "patch", "scaling", "survey"}
    assert "overhead of a quantum" in process.stdout


def test_unknown_benchmark() -> None:
    """A name that is none is refused beside those that there are."""
    command = [sys.executable, str(FOLDER), "nonsense"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert "there are network, patch, scaling" in process.stderr
