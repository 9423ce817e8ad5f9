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

r"""Shear bias from sums over objects, with errors.

In each arm of a simulation every galaxy has the same shear :math:`\gamma`.
The estimate is the mean ellipticity of the unsheared images over its response
to the artificial shear, and its bias is that of

.. math::
    \hat\gamma_i = c_i + (1 + m_i) \gamma_i + x_i \gamma_j
        + q_i \gamma_i |\gamma|^2 + \alpha_i p_i,
    \quad j \ne i,

where p is the shear of the PSF of the arm beside that of the scene.
"""

from __future__ import annotations

__all__ = ("PARAMETERS", "ShearBias", "ShearSums", "fit_bias", "make_table")

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import astropy.units as u
import numpy as np
from astropy.table import Column, Table

from .shapes import STEPS, Shapes

PARAMETERS: Mapping[str, str] = {
    "m1": "Multiplicative bias of g1",
    "m2": "Multiplicative bias of g2",
    "c1": "Additive bias of g1",
    "c2": "Additive bias of g2",
    "cross1": "Response of the estimated g1 to g2",
    "cross2": "Response of the estimated g2 to g1",
    "cubic1": "Coefficient of g1 |g|^2 in the estimated g1",
    "cubic2": "Coefficient of g2 |g|^2 in the estimated g2",
    "alpha1": "Leakage of the PSF shear into the estimated g1",
    "alpha2": "Leakage of the PSF shear into the estimated g2",
}
"""Meaning of the parameters of the fit."""

SUMS = ("sum_we1", "sum_we2", "sum_w", "n")
"""Sums over objects that everything follows from."""

ARM = ("g1", "g2", "psf_g1", "psf_g2")
"""What tells the arms of a simulation apart."""


@dataclasses.dataclass(eq=False)
class ShearSums:
    """Sums over objects in blocks that are independent of each other."""

    arms: np.ndarray
    """Shear and additional shear of the PSF of each arm, shape ``(A, 4)``."""

    step: float
    """Size of the artificial shear."""

    blocks: np.ndarray
    """Numbers of the blocks, int64, shape ``(B,)``."""

    values: np.ndarray
    """`SUMS` of each version of the images, shape ``(B, A, 5, 4)``."""

    def __len__(self) -> int:
        return len(self.blocks)

    @classmethod
    def from_shapes(
        cls,
        shapes: Sequence[Shapes],
        selected: Sequence[np.ndarray],
        *,
        arms: np.ndarray,
        block: int,
    ) -> ShearSums:
        """Add up the shapes of one block.

        Parameters
        ----------
        shapes
            Shapes in each arm.
        selected
            Which versions of which objects to add, for each arm, bool, shape
            ``(N, 5)``; see `Shapes.select`.
        arms
            As in the class.
        block
            Number of the block.

        Raises
        ------
        ValueError
            Raised if there is not one of each for every arm.
        """
        if not len(shapes) == len(selected) == len(arms):
            raise ValueError(f"{len(arms)} arms have shapes of {len(shapes)} and cuts of {len(selected)}.")
        values = np.zeros((1, len(arms), len(STEPS), len(SUMS)))
        for a, (shape, chosen) in enumerate(zip(shapes, selected, strict=True)):
            weight = np.where(chosen, shape.weight, 0.0)
            # NaN times zero is NaN.
            values[0, a, :, :2] = (weight[..., None] * np.where(chosen[..., None], shape.e, 0.0)).sum(axis=0)
            values[0, a, :, 2] = weight.sum(axis=0)
            values[0, a, :, 3] = chosen.sum(axis=0)
        return cls(np.asarray(arms, dtype=np.float64), shapes[0].step, np.array([block]), values)

    @classmethod
    def concatenate(cls, parts: Sequence[ShearSums]) -> ShearSums:
        """Join blocks; those of the same number are added up.

        Parameters
        ----------
        parts
            Sums, at least one.

        Raises
        ------
        ValueError
            Raised if there are none, or if they differ in arms or step.
        """
        if not parts:
            raise ValueError("There are no sums to join.")
        first = parts[0]
        for part in parts[1:]:
            if part.step != first.step or not np.array_equal(part.arms, first.arms):
                raise ValueError("Sums of different arms or artificial shears cannot be joined.")
        blocks, where = np.unique(np.concatenate([part.blocks for part in parts]), return_inverse=True)
        values = np.zeros((len(blocks), *first.values.shape[1:]))
        np.add.at(values, where, np.concatenate([part.values for part in parts]))
        return cls(first.arms, first.step, blocks, values)

    def to_table(self) -> Table:
        """Return a table with a row for each block, arm and version."""
        shape = self.values.shape[:3]
        block, arm, step = (index.ravel() for index in np.indices(shape))
        table = Table()
        table["block"] = Column(
            self.blocks[block], description="Number of the independent part of the sample"
        )
        for k, name in enumerate(ARM):
            what = "shear of the PSF beside that of the scene" if name.startswith("psf") else "true shear"
            table[name] = Column(
                self.arms[arm, k], unit=u.dimensionless_unscaled, description=f"Component of the {what}"
            )
        table["metaStep"] = Column(
            np.array(STEPS)[step], description="Artificial shear: none, or a component up or down"
        )
        table["step"] = Column(np.full(len(step), self.step), description="Size of the artificial shear")
        descriptions = (
            "Sum of weight times e1",
            "Sum of weight times e2",
            "Sum of weights",
            "Number of objects",
        )
        for k, (name, description) in enumerate(zip(SUMS, descriptions, strict=True)):
            table[name] = Column(self.values[..., k].ravel(), description=description)
        return table

    @classmethod
    def from_table(cls, table: Table) -> ShearSums:
        """Make from rows written by `to_table`, in any order.

        Parameters
        ----------
        table
            Table with a row for each block, arm and version.

        Raises
        ------
        ValueError
            Raised if columns or rows are missing, or if the table mixes
            artificial shears.
        """
        if missing := {"block", "metaStep", "step", *ARM, *SUMS} - set(table.colnames):
            raise ValueError(f"Not a table of shear sums: it has no columns {sorted(missing)}.")
        steps = np.unique(table["step"])
        if len(steps) != 1:
            raise ValueError(f"The table has {len(steps)} sizes of the artificial shear, not one.")
        blocks, block = np.unique(np.asarray(table["block"]), return_inverse=True)
        columns = np.stack([np.asarray(table[name], dtype=np.float64) for name in ARM], axis=1)
        arms, arm = np.unique(columns, axis=0, return_inverse=True)
        names = np.asarray(table["metaStep"]).astype(str)
        if unknown := set(names) - set(STEPS):
            raise ValueError(f"metaStep is one of {', '.join(STEPS)}, not {sorted(unknown)}.")
        version = np.array([STEPS.index(name) for name in names])
        shape = (len(blocks), len(arms), len(STEPS))
        counts = np.zeros(shape, dtype=int)
        np.add.at(counts, (block, arm.ravel(), version), 1)
        if (counts != 1).any():
            raise ValueError("The table must have one row for each block, arm and metaStep.")
        values = np.zeros((*shape, len(SUMS)))
        sums = np.stack([np.asarray(table[name], dtype=np.float64) for name in SUMS], axis=1)
        values[block, arm.ravel(), version] = sums
        return cls(arms, float(steps[0]), blocks, values)


@dataclasses.dataclass(frozen=True, eq=False)
class ShearBias:
    """The result of `fit_bias`."""

    values: Mapping[str, float]
    """The `PARAMETERS`; NaN if the arms do not tell, or if ``flag``."""

    errors: Mapping[str, float]
    """Their standard errors by the jackknife."""

    bootstrap_errors: Mapping[str, float]
    """Their standard errors by the bootstrap."""

    covariance: np.ndarray
    """Covariance by the jackknife in the order of `PARAMETERS`, shape
    ``(10, 10)``."""

    response: np.ndarray
    """Mean response of the ellipticity to shear, shape ``(2, 2)``."""

    response_errors: np.ndarray
    """Its standard errors, shape ``(2, 2)``."""

    n_objects: float
    """Number of measurements in an arm, on average."""

    n_blocks: int
    """Number of blocks."""

    flag: bool
    """Whether there is no result, or none with an error."""

    reason: str
    """Why there is none; empty if not ``flag``."""


def fit_bias(
    sums: ShearSums,
    *,
    reference: ShearSums | None = None,
    cubic: bool | None = None,
    min_response_snr: float = 5.0,
    n_bootstrap: int = 500,
    seed: int = 1,
) -> ShearBias:
    """Fit the shear bias of a sample.

    Parameters
    ----------
    sums
        Sums over the sample.
    reference
        Sums over another sample with the same blocks, such as other galaxies
        with the same noise.  If given, the result is the bias of the first
        less that of this one, with the errors of the difference.
    cubic
        Whether to fit the cubic term; by default if the arms have shears of
        two or more sizes.
    min_response_snr
        Signal to noise of the response below which a sample is flagged
        instead of dividing by something that may be zero.
    n_bootstrap
        Number of samples of the bootstrap.
    seed
        Seed of the bootstrap.

    Returns
    -------
    bias
        The bias.  A sample of one block has values but no errors, and is
        flagged.

    Raises
    ------
    ValueError
        Raised if no two arms differ in shear, or if the reference has other
        arms or blocks.

    Notes
    -----
    The response is that of all arms with one size of the shear and one PSF,
    as the response itself depends on the square of the shear.  Jackknife and
    bootstrap repeat the whole computation without each block, and with
    blocks drawn with replacement; from sums that is exact, and cheap.
    """
    model = _BiasModel(sums.arms, sums.step, cubic)
    samples = [sums] if reference is None else [sums, reference]
    for sample in samples[1:]:
        if not (np.array_equal(sample.arms, sums.arms) and np.array_equal(sample.blocks, sums.blocks)):
            raise ValueError("Samples can be compared if they have the same arms and blocks.")

    def compute(factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return parameters and responses, blocks weighted by factors.

        Parameters
        ----------
        factors
            Weights of the blocks in each repetition, shape ``(R, B)``.
        """
        fits = [model.fit(np.tensordot(factors, sample.values, axes=1)) for sample in samples]
        parameters = fits[0][0] if len(fits) == 1 else fits[0][0] - fits[1][0]
        return parameters, np.concatenate([response for _, response in fits], axis=-2)

    n = len(sums)
    parameters, response = compute(np.ones((1, n)))
    left_out, left_out_response = compute(1.0 - np.eye(n))
    covariance = _compute_covariance(left_out) * (n - 1) ** 2 / max(n, 1)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=n_bootstrap) if n else np.zeros((n_bootstrap, 0))
    drawn, _ = compute(counts.astype(float))
    bootstrap = np.sqrt(np.diag(_compute_covariance(drawn)))
    scatter = np.sqrt((n - 1) ** 2 / max(n, 1) * _compute_variance(left_out_response))

    diagonal = np.array([[k, k % 2] for k in range(response.shape[-2])])
    strength, strength_error = (
        array[..., diagonal[:, 0], diagonal[:, 1]] for array in (np.abs(response[0]), scatter)
    )
    reason = ""
    if not all(sample.values[..., -1].any() for sample in samples):
        reason = "no objects"
    elif not np.isfinite(parameters[0, model.fitted]).all():
        reason = "an arm has no objects"
    elif n < 2:
        reason = "one block has no error"
    elif not (strength > min_response_snr * strength_error).all():
        reason = "the response is consistent with zero"
    elif not np.isfinite(covariance[np.ix_(model.fitted, model.fitted)]).all():
        reason = "an arm has objects in one block only"
    if reason and n >= 2:
        parameters = np.full_like(parameters, np.nan)
    return ShearBias(
        values=dict(zip(PARAMETERS, parameters[0].tolist(), strict=True)),
        errors=dict(zip(PARAMETERS, np.sqrt(np.diag(covariance)).tolist(), strict=True)),
        bootstrap_errors=dict(zip(PARAMETERS, bootstrap.tolist(), strict=True)),
        covariance=covariance,
        response=response[0, :2],
        response_errors=scatter[:2],
        n_objects=float(sums.values[:, :, 0, -1].sum() / len(sums.arms)),
        n_blocks=n,
        flag=bool(reason),
        reason=reason,
    )


def make_table(columns: Mapping[str, tuple[str, str]], rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return results as a table.

    Parameters
    ----------
    columns
        Type and description of each column.
    rows
        Values of all columns in each row.
    """
    table = Table()
    for name, (dtype, description) in columns.items():
        table[name] = Column(np.array([row[name] for row in rows], dtype=dtype), description=description)
    return table


class _BiasModel:
    """The linear fit of the bias to the estimates of all arms.

    Parameters
    ----------
    arms
        Shear and PSF shear of each arm, shape ``(A, 4)``.
    step
        Size of the artificial shear.
    cubic
        As for `fit_bias`.
    """

    def __init__(self, arms: np.ndarray, step: float, cubic: bool | None) -> None:
        self._step = step
        shear, psf_shear = arms[:, :2], arms[:, 2:]
        squared = np.round((shear**2).sum(axis=1), 12)
        groups = np.concatenate([squared[:, None], psf_shear], axis=1)
        self._groups = np.unique(groups, axis=0, return_inverse=True)[1].ravel()
        if cubic is None:
            cubic = len(set(squared) - {0.0}) > 1
        self._solutions = []
        self.fitted: list[int] = []
        names = list(PARAMETERS)
        for i in (0, 1):
            columns = {"c": np.ones(len(arms)), "m": shear[:, i]}
            if np.ptp(shear[:, 1 - i]) > 0:
                columns["cross"] = shear[:, 1 - i]
            if cubic:
                columns["cubic"] = shear[:, i] * squared
            if np.ptp(psf_shear[:, i]) > 0:
                columns["alpha"] = psf_shear[:, i]
            # Terms differ by orders of magnitude.
            design = np.stack(list(columns.values()), axis=1)
            scale = np.abs(design).max(axis=0)
            if np.linalg.matrix_rank(design / np.where(scale > 0, scale, 1.0)) < design.shape[1]:
                raise ValueError(
                    f"The {len(arms)} arms do not tell {', '.join(f'{name}{i + 1}' for name in columns)} "
                    "apart: simulate shears of both signs, and of two sizes for the cubic term."
                )
            positions = [names.index(f"{name}{i + 1}") for name in columns]
            self._solutions.append((positions, np.linalg.pinv(design / scale) / scale[:, None]))
            self.fitted += positions

    def fit(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return parameters and mean response for K sets of sums.

        Parameters
        ----------
        values
            Sums, shape ``(K, A, 5, 4)``.

        Returns
        -------
        parameters
            In the order of `PARAMETERS`, NaN if not fitted or if an arm has
            no objects, shape ``(K, 10)``.
        response
            Response of all arms together, shape ``(K, 2, 2)``.
        """
        parameters = np.full((len(values), len(PARAMETERS)), np.nan)
        estimates = np.empty(values.shape[:2] + (2,))
        for group in np.unique(self._groups):
            members = np.flatnonzero(self._groups == group)
            response = self._compute_response(values[:, members].sum(axis=1))  # (K, 2, 2)
            inverse = _invert(response)
            mean = _divide(values[:, members, 0, :2], values[:, members, 0, 2:3])
            estimates[:, members] = np.einsum("kij,kaj->kai", inverse, mean)
        for i, (positions, solution) in enumerate(self._solutions):
            parameters[:, positions] = estimates[:, :, i] @ solution.T
        # m is the slope less one.
        parameters[:, :2] -= 1.0
        return parameters, self._compute_response(values.sum(axis=1))

    def _compute_response(self, values: np.ndarray) -> np.ndarray:
        """Return how mean ellipticities follow shear, from ``(K, 5, 4)``."""
        mean = _divide(values[..., :2], values[..., 2:3])
        # Mean values of each version: weights and cuts respond as well.
        difference = np.stack([mean[:, 1] - mean[:, 2], mean[:, 3] - mean[:, 4]], axis=2)
        return difference / (2 * self._step)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return quotients, NaN where the denominator is not positive."""
    positive = denominator > 0
    return np.where(positive, numerator, np.nan) / np.where(positive, denominator, 1.0)


def _invert(matrices: np.ndarray) -> np.ndarray:
    """Return the inverses of 2 x 2 matrices, NaN of singular ones."""
    (a, b), (c, d) = np.moveaxis(matrices, (-2, -1), (0, 1))
    determinant = a * d - b * c
    adjugate = np.stack([np.stack([d, -b], axis=-1), np.stack([-c, a], axis=-1)], axis=-2)
    regular = (np.abs(determinant) > 0)[..., None, None]
    return np.where(regular, adjugate, np.nan) / np.where(regular, determinant[..., None, None], 1.0)


def _compute_variance(samples: np.ndarray) -> np.ndarray:
    """Return the variance along the first axis, NaN of a single sample."""
    if len(samples) < 2:
        return np.full(samples.shape[1:], np.nan)
    return samples.var(axis=0, ddof=1)


def _compute_covariance(samples: np.ndarray) -> np.ndarray:
    """Return the covariance of ``(K, P)``, NaN of a single sample."""
    if len(samples) < 2:
        return np.full((samples.shape[1],) * 2, np.nan)
    difference = samples - samples.mean(axis=0)
    covariance: np.ndarray = difference.T @ difference / (len(samples) - 1)
    return covariance
