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


"""What lens finders say of examples, and of examples that were spoilt."""

from __future__ import annotations

__all__ = ("RING_FINDER", "ExampleScorer", "Measurements")

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
from astropy.table import Table, vstack

from ..cutouts import Cutouts
from .degradation import blur, change_zero_point, mask_stripe, remove_band, shift_centers
from .lens_network import EvaluationError, LensNetwork
from .ring_finder import find_rings
from .simple_features import measure_center, measure_magnitudes, measure_outskirts
from .simulate_lenses_task import EXAMPLE_COLUMNS

if TYPE_CHECKING:
    from lsst.utils.logging import LsstLogAdapter

    from .evaluate_lens_finder_task import EvaluateLensFinderConfig

RING_FINDER = "RingFinder S/N"
"""Name of the signal to noise of RingFinder as a score."""


@dataclasses.dataclass(frozen=True, eq=False)
class Measurements:
    """What was measured on the stamps."""

    rows: Table
    """Truth and scores of every example."""

    changed: Table
    """Scores of some test examples under changes, ``<name>: <change>``."""

    probes: Table
    """Features of test lenses and of hosts without arcs."""

    n_excluded: int
    """Number of examples that were left out."""


class ExampleScorer:
    """Scores examples with several lens finders.

    Parameters
    ----------
    config
        Configuration of the evaluation.
    finders
        Networks.
    num_cores
        Threads that may be used on a CPU.
    log
        Log.
    """

    def __init__(
        self,
        config: EvaluateLensFinderConfig,
        finders: list[LensNetwork],
        num_cores: int,
        log: LsstLogAdapter,
    ) -> None:
        self._config = config
        self._finders = finders
        self._num_cores = num_cores
        self._log = log

    def measure(self, tables: Iterable[Table]) -> Measurements:
        """Return all that is needed of the stamps.

        Parameters
        ----------
        tables
            Tables of `SimulateLensesTask`; one is held in memory at a time.

        Raises
        ------
        EvaluationError
            Raised if the examples do not fit the lens finders or each other.
        """
        rows, changed, probes = [], [], []
        n_excluded, geometry = 0, None
        rng = np.random.default_rng(self._config.seed)
        for table in tables:
            if missing := {name for name, _, _ in EXAMPLE_COLUMNS} - set(table.colnames):
                raise EvaluationError(f"The examples have no columns {sorted(missing)}.")
            try:
                cutouts = Cutouts.from_table(table)
            except ValueError as err:
                raise EvaluationError(str(err)) from err
            here = (cutouts.bands, cutouts.size, round(cutouts.pixel_scale, 4))
            if geometry not in (None, here):
                raise EvaluationError(
                    f"Examples of {geometry} and of {here} (bands, pixels, arcsec) cannot be evaluated "
                    "together."
                )
            geometry = here
            spoilt = (~cutouts.bad & ~np.isfinite(cutouts.image)).any(axis=(1, 2, 3))
            n_excluded += int(spoilt.sum())
            truth = table[[name for name, _, _ in EXAMPLE_COLUMNS]][~spoilt]
            truth["ra"] = cutouts.ra[~spoilt]
            cutouts = cutouts[~spoilt]
            for start in range(0, len(truth), self._config.chunkSize):
                chunk = slice(start, start + self._config.chunkSize)
                rows.append(self._score_chunk(truth[chunk], cutouts[chunk]))
                if self._config.doProbe:
                    probes.append(self._measure_features(truth[chunk], cutouts[chunk]))
            if self._config.maxRobustness and self._finders:
                chosen = np.flatnonzero(truth["split"] == "test")
                chosen = np.sort(rng.permutation(chosen)[: self._config.maxRobustness])
                changed.append(self._score_changed(truth[chosen], cutouts[chosen], rng))
        if n_excluded:
            self._log.warning("%d examples have good pixels that are not finite; left out.", n_excluded)
        return Measurements(_stack(rows), _stack(changed), _stack(probes), n_excluded)

    def _score(self, finder: LensNetwork, cutouts: Cutouts) -> np.ndarray:
        return finder.score(cutouts, self._config.inference, self._num_cores)

    def _score_chunk(self, truth: Table, cutouts: Cutouts) -> Table:
        """Return truth and what each lens finder says."""
        rows = truth.copy()
        if self._config.doColors:
            rows["magnitudes"] = measure_magnitudes(cutouts, self._config.apertureRadii)
        looked_at = np.asarray(truth["split"] != "train")
        for finder in self._finders:
            rows[finder.name] = np.full(len(rows), np.nan)
            rows[finder.name][looked_at] = self._score(finder, cutouts[looked_at])
        if self._config.doRingFinder:
            test = np.asarray(truth["split"] == "test")
            rows[RING_FINDER] = np.full(len(rows), np.nan)
            rows["ring_finder_is_lens"] = np.zeros(len(rows), dtype=bool)
            try:
                rings = find_rings(cutouts[test], self._config.ringFinder)
            except ValueError as err:
                raise EvaluationError(f"{err}  Or set doRingFinder to False.") from err
            # No signal to noise is as good as none.
            rows[RING_FINDER][test] = np.nan_to_num(rings.snr, nan=-np.inf)
            rows["ring_finder_is_lens"][test] = rings.is_lens
        return rows

    def _score_changed(self, truth: Table, cutouts: Cutouts, rng: np.random.Generator) -> Table:
        """Return what networks say of stamps that were changed."""
        rows = truth[["label"]].copy()
        config = self._config
        changes: dict[str, Callable[[Cutouts], Cutouts]] = {
            f"centre off by up to {config.shift} pixels": functools.partial(
                shift_centers, largest=config.shift, rng=rng
            ),
            f"seeing {config.seeingFactor:g} times as wide": functools.partial(
                blur, factor=config.seeingFactor, rng=rng
            ),
            f"bad stripe over {config.maskedFraction:.0%}": functools.partial(
                mask_stripe, fraction=config.maskedFraction, rng=rng
            ),
        }
        for error in (config.zeroPointError, -config.zeroPointError):
            changes[f"{cutouts.bands[0]} band {error:+g} mag"] = functools.partial(
                change_zero_point, band=0, error=error
            )
        for band, name in enumerate(cutouts.bands):
            changes[f"no {name} band"] = functools.partial(remove_band, band=band)
        for finder in self._finders:
            rows[f"{finder.name}: unchanged"] = self._score(finder, cutouts)
        for change, apply in changes.items():
            stamps = apply(cutouts)
            for finder in self._finders:
                rows[f"{finder.name}: {change}"] = self._score(finder, stamps)
        return rows

    def _measure_features(self, truth: Table, cutouts: Cutouts) -> Table:
        """Return features of lenses and of the galaxies that have no arcs."""
        chosen = np.asarray(
            (truth["split"] == "test") & (truth["label"] | (truth["kind"] == self._config.probeKind))
        )
        rows, cutouts = truth[["label", "host_id"]][chosen], cutouts[chosen]
        rows["central pixels"] = measure_center(cutouts)
        rows["outskirts"] = measure_outskirts(cutouts, self._config.outskirtsRadius)
        for finder in self._finders:
            features = finder.compute_features(cutouts, self._num_cores)
            if features is not None:
                rows[finder.name] = features
        return rows


def _stack(tables: list[Table]) -> Table:
    """Join tables, of which there may be none."""
    return vstack(tables, metadata_conflicts="silent") if tables else Table()
