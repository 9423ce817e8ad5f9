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

"""Take the pictures of the inspection page that the documentation shows.

Run as ``python doc/screenshots.py PAGE CHROMIUM`` with the page and the key
of ``doc/visual-inspection.rst``; it grades as an able voter would.
"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from lsst.meas.deeplearn.lenses.vote_files import read_truth

IMAGES = Path(__file__).parent / "images"


def shoot(page: Page, name: str, quality: int = 82) -> None:
    """Write what is seen."""
    page.wait_for_timeout(300)
    page.screenshot(path=IMAGES / f"{name}.jpg", type="jpeg", quality=quality)


def main(path: Path, chromium: str) -> None:
    """Open the page, grade a few, and take pictures on the way."""
    truth = read_truth(path.with_name(f"{path.stem}_key.csv"))
    with sync_playwright() as context:
        browser = context.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1366, "height": 768})
        page.goto(path.resolve().as_uri())
        shoot(page, "inspection_start", 70)
        page.fill("#name", "Ada")
        page.keyboard.press("Enter")
        lens = None
        for k in range(20):
            is_lens = truth.get(int(page.inner_text("#heading small")), False)
            lens = k if is_lens and lens is None else lens
            page.keyboard.press("abc"[k % 2] if is_lens else "nnc"[k % 3])
        page.click(f"#card{lens or 0}")
        page.focus("#views button")
        shoot(page, "inspection_page")
        page.select_option("#filter", "none")
        page.keyboard.press("7")
        shoot(page, "inspection_difference")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
