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

"""Sphinx configuration; build with ``sphinx-build -W doc doc/_build``."""

import sys
from pathlib import Path

from sphinx.application import Sphinx

import lsst.meas.deeplearn

sys.path.insert(0, str(Path(__file__).parent))

project = "meas_deeplearn"
copyright = "2026, the meas_deeplearn developers"
release = lsst.meas.deeplearn.__version__

extensions = [
    "myst_parser",
    "pipeline_task",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "changes/*"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = "meas_deeplearn"

# Docstrings write names in single backquotes, as all of LSST does.
default_role = "py:obj"
suppress_warnings = ["ref.python"]  # `x` is an attribute of many classes
autosummary_generate = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = False
napoleon_use_ivar = True


def add_files(app: Sphinx, page: str, source: list[str]) -> None:
    """Add the cards of all models, and the changes since the last release."""
    folder = Path(app.srcdir)
    if page == "model-cards":
        for card in sorted((folder.parent / "models").glob("*.md")):
            source[0] += f"\n.. include:: ../models/{card.name}\n   :parser: myst_parser.sphinx_\n"
    if page == "whats-new":
        for fragment in sorted((folder / "changes").glob("*.rst")):
            source[0] += "\n* " + fragment.read_text(encoding="utf-8").strip().replace("\n", "\n  ") + "\n"


def setup(app: Sphinx) -> None:
    """Tell Sphinx to call `add_files`."""
    app.connect("source-read", add_files)
