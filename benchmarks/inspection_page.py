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

"""Processor time and memory of an inspection page in Chromium.

Run as ``python benchmarks/inspection_page.py``; see ``--help``.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
from astropy.table import Table
from playwright.sync_api import sync_playwright

from lsst.meas.deeplearn.cutouts import Cutouts
from lsst.meas.deeplearn.lenses.visual_inspection import write_inspection_page

NAME = "meas_deeplearn.inspection.name"

SET = "const e = document.getElementById('{0}'); e.value = '{1}'; e.dispatchEvent(new Event('{2}'));"
VOTE = "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'n', bubbles: true}));"
STEPS = {
    "show scores": "document.getElementById('show-scores').click();",
    "sort by S/N": SET.format("sort", "ringfinder_snr", "change"),
    "sort as before": SET.format("sort", "page", "change"),
    "filter by flags": SET.format("flags", "with", "change"),
    "filter off": SET.format("flags", "any", "change"),
    "another view": SET.format("view", "g", "change"),
    "brightness": SET.format("brightness", "3", "input"),
    "a vote": VOTE,
    "filter by grade": SET.format("filter", "none", "change"),
    "a vote in the filter": VOTE,
}
"""What people do, as a script."""


def make_tables(n: int, size: int) -> tuple[Table, Cutouts]:
    """Make candidates with stamps of noise and a galaxy."""
    rng = np.random.default_rng(1)
    ids = 10**17 + np.arange(n)
    candidates = Table({"objectId": ids, "coord_ra": np.full(n, 150.0), "coord_dec": np.full(n, 2.0)})
    candidates["score"], candidates["ringfinder_snr"] = np.linspace(1, 0, n), rng.exponential(5.0, n)
    candidates["flag_edge"] = rng.random(n) < 0.1
    y, x = np.mgrid[:size, :size] - size // 2
    image = rng.normal(size=(n, 3, size, size)) + 300 * np.exp(-0.5 * (x**2 + y**2) / 6)
    shape = image.shape
    cutouts = Cutouts(
        bands=("g", "r", "i"), pixel_scale=0.2, ids=ids, ra=np.full(n, 150.0), dec=np.full(n, 2.0),
        x=np.zeros(n), y=np.zeros(n), image=image.astype(np.float32), variance=np.ones(shape, np.float32),
        bad=np.zeros(shape, bool), psf=np.zeros((n, 3, 0, 0), np.float32), off_edge=np.zeros(n, bool),
        missing_band=np.zeros((n, 3), bool), missing_cell=np.zeros((n, 3), bool),
    )  # fmt: skip
    return candidates, cutouts


def main() -> None:
    """Print what the page needs for each step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--candidates", type=int, default=2000)
    parser.add_argument("--size", type=int, default=45, help="side of the stamps in pixels")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="path of the browser")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as context:
        path = Path(folder) / "page.html"
        write_inspection_page(path, *make_tables(args.candidates, args.size))
        print(f"{args.candidates} candidates: {path.stat().st_size / 1e6:.1f} MB")
        browser = context.chromium.launch(
            executable_path=args.chromium,
            args=["--no-sandbox", "--disable-gpu", "--enable-precise-memory-info"],
        )
        page = browser.new_page(viewport={"width": 1366, "height": 768})
        page.add_init_script(f"localStorage.setItem('{NAME}', 'Ada')")
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})

        def measure() -> float:
            metrics = {
                item["name"]: item["value"] for item in session.send("Performance.getMetrics")["metrics"]
            }
            return metrics["TaskDuration"]

        start = measure()
        page.goto(path.as_uri())
        page.wait_for_timeout(1000)
        print(f"{'open':24}{1e3 * (measure() - start):6.0f} ms")
        for name, script in STEPS.items():
            start = measure()
            # Until it is painted.
            wait = "await new Promise((r) => requestAnimationFrame(() => requestAnimationFrame(r)));"
            page.evaluate(f"async () => {{ {script} {wait} }}")
            print(f"{name:24}{1e3 * (measure() - start):6.0f} ms")
        print(f"{'memory':24}{page.evaluate('performance.memory.usedJSHeapSize') / 1e6:6.0f} MB")
        browser.close()


if __name__ == "__main__":
    main()
