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

"""Compute the shear bias of a tract from the sums of its patches."""

from __future__ import annotations

__all__ = ("ShearBiasConfig", "ShearBiasConnections", "ShearBiasTask")

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any, ClassVar

from astropy.table import Table, vstack

import lsst.pipe.base.connectionTypes as cT
from lsst.pex.config import ChoiceField, Field, RangeField
from lsst.pipe.base import (
    NoWorkFound,
    PipelineTask,
    PipelineTaskConfig,
    PipelineTaskConnections,
    QuantumContext,
    Struct,
)
from lsst.pipe.base.connections import InputQuantizedConnection, OutputQuantizedConnection

from .bias import PARAMETERS, ShearBias, ShearSums, fit_bias, make_table

BIAS_COLUMNS: Mapping[str, tuple[str, str]] = {
    "morphology": ("U16", "Kind of simulated galaxies"),
    "reference": ("U16", "Kind of galaxies whose bias is subtracted; empty for the bias itself"),
    "estimator": ("U16", "Shear estimator"),
    "bin": ("U32", "Name of the bin; all for all objects"),
    "bin_quantity": ("U16", "What the bin is in; empty for all objects"),
    "bin_low": ("f8", "Lower edge of the bin"),
    "bin_high": ("f8", "Upper edge of the bin"),
    **{
        f"{name}{suffix}": ("f8", f"{meaning}{what}")
        for name, meaning in PARAMETERS.items()
        for suffix, what in (
            ("", "; NaN if the simulation does not tell, or if flagged"),
            ("_err", ": its standard error by the jackknife"),
            ("_err_bootstrap", ": its standard error by the bootstrap"),
        )
    },
    "response11": ("f8", "Response of the mean e1 to shear g1"),
    "response12": ("f8", "Response of the mean e1 to shear g2"),
    "response21": ("f8", "Response of the mean e2 to shear g1"),
    "response22": ("f8", "Response of the mean e2 to shear g2"),
    "n_objects": ("f8", "Number of measurements for each true shear"),
    "n_blocks": ("i8", "Number of independent blocks"),
    "flag": ("?", "There is no result, or none with an error"),
    "reason": ("U64", "Why there is none; empty if not flagged"),
}
"""Type and description of each column of ``shear_bias``; none has a unit."""

TRANSFER_COLUMNS: Mapping[str, tuple[str, str]] = {
    "estimator": ("U16", "Shear estimator"),
    "calibrated_on": ("U16", "Kind of galaxies that m and c were taken from"),
    "applied_to": ("U16", "Kind of galaxies to which they were applied"),
    **{
        f"{name}{i}{suffix}": ("f8", f"{meaning} bias of g{i} that is left{what}")
        for name, meaning in (("m", "Multiplicative"), ("c", "Additive"))
        for i in "12"
        for suffix, what in (("", ""), ("_err", ": its standard error, galaxies being paired"))
    },
    "flag": ("?", "One of both has no result"),
}
"""Type and description of each column of ``shear_bias_transfer``."""

_SAMPLE = ("morphology", "estimator", "bin", "bin_quantity", "bin_low", "bin_high")


class ShearBiasConnections(PipelineTaskConnections, dimensions=("skymap", "tract")):
    """Datasets that `ShearBiasTask` reads and writes.

    Parameters
    ----------
    config
        Configuration of the task.
    """

    sums = cT.Input(
        doc="Sums over simulated galaxies of a patch.",
        name="shear_calib_sums",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract", "patch"),
        multiple=True,
        deferLoad=True,
    )
    bias = cT.Output(
        doc="Multiplicative and additive shear bias, PSF leakage and their errors, a row for each "
        "morphology, estimator and bin, and for each difference between morphologies.",
        name="shear_bias",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract"),
    )
    transfer = cT.Output(
        doc="Bias that is left if an estimator is calibrated on galaxies of one morphology, and applied to "
        "those of another.",
        name="shear_bias_transfer",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract"),
    )
    morphologyPlot = cT.Output(
        doc="m and c by morphology for each estimator.",
        name="shear_bias_morphology_plot",
        storageClass="Plot",
        dimensions=("skymap", "tract"),
    )
    binPlot = cT.Output(
        doc="m by signal to noise, size, magnitude and redshift, for the estimator of plotEstimator.",
        name="shear_bias_bin_plot",
        storageClass="Plot",
        dimensions=("skymap", "tract"),
    )

    config: ShearBiasConfig

    def __init__(self, *, config: ShearBiasConfig):
        super().__init__(config=config)
        if config.level == "skymap":
            self.dimensions = {"skymap"}
            for name in ("bias", "transfer", "morphologyPlot", "binPlot"):
                setattr(self, name, dataclasses.replace(getattr(self, name), dimensions={"skymap"}))


class ShearBiasConfig(PipelineTaskConfig, pipelineConnections=ShearBiasConnections):
    """Configuration of `ShearBiasTask`."""

    level = ChoiceField[str](
        doc="What one result is for.",
        default="tract",
        allowed={"tract": "The patches of a tract.", "skymap": "All patches."},
    )
    plotEstimator = Field[str](doc="Estimator whose bias is shown by bin.", default="metacal")
    reference = Field[str](
        doc="Morphology with which the others are compared; those of the simulation that have it are.",
        default="sersic",
    )
    minResponseSnr = RangeField(
        dtype=float,
        doc="Signal to noise of the response below which a sample is flagged instead of divided.",
        default=5.0,
        min=0.0,
    )
    nBootstrap = RangeField(dtype=int, doc="Number of samples of the bootstrap.", default=500, min=2)


class ShearBiasTask(PipelineTask):
    """Compute the shear bias of a tract from the sums of its patches."""

    ConfigClass: ClassVar[type[ShearBiasConfig]] = ShearBiasConfig
    _DefaultName: ClassVar[str] = "shearBias"
    config: ShearBiasConfig

    def runQuantum(
        self,
        butlerQC: QuantumContext,
        inputRefs: InputQuantizedConnection,
        outputRefs: OutputQuantizedConnection,
    ) -> None:
        inputs = butlerQC.get(inputRefs)
        butlerQC.put(self.run([handle.get() for handle in inputs["sums"]]), outputRefs)

    def run(self, sums: Sequence[Table]) -> Struct:
        """Compute the bias of all samples.

        Parameters
        ----------
        sums
            The table ``sums`` of `ShearCalibTask` for each patch.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            Results as a struct with attributes:

            ``bias``
                The columns of `BIAS_COLUMNS` (`astropy.table.Table`).

            ``transfer``
                The columns of `TRANSFER_COLUMNS` (`astropy.table.Table`).

            ``morphologyPlot``, ``binPlot``
                Figures of the bias (`matplotlib.figure.Figure`).

        Raises
        ------
        lsst.pipe.base.NoWorkFound
            Raised if there are no sums.
        ValueError
            Raised if the tables do not fit together.
        """
        filled = [table for table in sums if len(table)]
        if not filled:
            raise NoWorkFound("There are no sums of simulated galaxies.")
        samples = _split(vstack(filled, metadata_conflicts="silent"))
        rows = []
        for sample, values in samples.items():
            rows.append(self._make_row(sample, "", self._fit(values)))
            reference = samples.get((self.config.reference, *sample[1:]))
            if reference is not None and sample[0] != self.config.reference:
                rows.append(self._make_row(sample, self.config.reference, self._fit(values, reference)))
        bias = make_table(BIAS_COLUMNS, rows)
        for row in bias[(bias["bin"] == "all") & (bias["reference"] == "") & ~bias["flag"]]:
            self.log.info(
                "%s, %s: m1 = %.2e +- %.1e, m2 = %.2e +- %.1e, c1 = %.2e +- %.1e, c2 = %.2e +- %.1e.",
                *(row[name] for name in ("estimator", "morphology")),
                *(row[f"{name}{suffix}"] for name in ("m1", "m2", "c1", "c2") for suffix in ("", "_err")),
            )
        self.metadata["n_samples"] = len(bias)
        self.metadata["n_flagged"] = int(bias["flag"].sum())
        from .plots import plot_bias_by_bin, plot_bias_by_morphology

        return Struct(
            bias=bias,
            transfer=self._make_transfer(samples),
            morphologyPlot=plot_bias_by_morphology(bias),
            binPlot=plot_bias_by_bin(bias, self.config.plotEstimator),
        )

    def _make_transfer(self, samples: Mapping[tuple[Any, ...], ShearSums]) -> Table:
        """Return what is left of the bias of one morphology after the
        calibration of another.
        """
        every = {sample[:2]: sums for sample, sums in samples.items() if sample[2] == "all"}
        rows = []
        for estimator in dict.fromkeys(name for _, name in every):
            morphologies = [morphology for morphology, name in every if name == estimator]
            for one, other in permutations(morphologies, 2):
                known = self._fit(every[one, estimator])
                difference = self._fit(every[other, estimator], every[one, estimator])
                row: dict[str, Any] = {"estimator": estimator, "calibrated_on": one, "applied_to": other}
                for name in ("m1", "m2", "c1", "c2"):
                    # (g + m g + c - c') / (1 + m') has these terms; that of
                    # c with the difference of m is of second order.
                    factor = 1 / (1 + known.values[f"m{name[1]}"])
                    row[name] = factor * difference.values[name]
                    row[f"{name}_err"] = factor * difference.errors[name]
                rows.append(row | {"flag": known.flag or difference.flag})
        return make_table(TRANSFER_COLUMNS, rows)

    def _fit(self, sums: ShearSums, reference: ShearSums | None = None) -> ShearBias:
        """Fit the bias with the settings of the task."""
        return fit_bias(
            sums,
            reference=reference,
            min_response_snr=self.config.minResponseSnr,
            n_bootstrap=self.config.nBootstrap,
        )

    def _make_row(self, sample: tuple[Any, ...], reference: str, bias: ShearBias) -> dict[str, Any]:
        """Return the values of all columns."""
        row = dict(zip(_SAMPLE, sample, strict=True)) | {"reference": reference}
        for name in PARAMETERS:
            row[name] = bias.values[name]
            row[f"{name}_err"] = bias.errors[name]
            row[f"{name}_err_bootstrap"] = bias.bootstrap_errors[name]
        for i in (0, 1):
            for j in (0, 1):
                row[f"response{i + 1}{j + 1}"] = bias.response[i, j]
        for name in ("n_objects", "n_blocks", "flag", "reason"):
            row[name] = getattr(bias, name)
        return row


def _split(table: Table) -> dict[tuple[Any, ...], ShearSums]:
    """Return the sums of each morphology, estimator and bin."""
    if missing := set(_SAMPLE) - set(table.colnames):
        raise ValueError(f"Not a table of ShearCalibTask: it has no columns {sorted(missing)}.")
    groups = table.group_by(list(_SAMPLE)).groups
    return {
        tuple(key[name] for name in _SAMPLE): ShearSums.from_table(group)
        for key, group in zip(groups.keys, groups, strict=True)
    }
