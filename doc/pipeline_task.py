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

"""A Sphinx directive that describes pipeline tasks from their code.

``.. pipeline-tasks:: PACKAGE`` has a section for each task of the package:
what it reads and writes, and the fields of its configuration with their
defaults.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from lsst.pex.config import ChoiceField, Config, ConfigField
from lsst.pipe.base import PipelineTask


class PipelineTasksDirective(SphinxDirective):
    """Describe the pipeline tasks of the package that is the argument."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        return [describe_task(task) for task in find_tasks(self.arguments[0])]


def find_tasks(package: str) -> list[type[PipelineTask]]:
    """Return the tasks in the modules ``*_task`` of a package."""
    folder = importlib.import_module(package).__path__
    tasks = []
    for module in pkgutil.iter_modules(folder, f"{package}."):
        if module.name.endswith("_task"):
            values = vars(importlib.import_module(module.name)).values()
            tasks += [
                value
                for value in values
                if isinstance(value, type)
                and issubclass(value, PipelineTask)
                and value.__module__ == module.name
            ]
    return tasks


def describe_task(task: type[PipelineTask]) -> nodes.section:
    """Return the section of a task."""
    config = task.ConfigClass()
    connections = config.ConnectionsClass(config=config)
    dimensions = ", ".join(sorted(connections.dimensions)) or "none"
    return nodes.section(
        "",
        nodes.title("", task.__name__),
        nodes.paragraph("", (task.__doc__ or "").strip().splitlines()[0]),
        nodes.paragraph("", "", nodes.strong("", "Module: "), nodes.literal("", task.__module__)),
        nodes.paragraph("", "", nodes.strong("", "Dimensions: "), nodes.Text(dimensions)),
        *(
            make_list(heading, list(describe_connections(connections, kinds)))
            for heading, kinds in (
                ("Reads", ("prerequisiteInputs", "inputs")),
                ("Writes", ("outputs", "initOutputs")),
            )
        ),
        make_list("Configuration", list(describe_fields(config))),
        ids=[task.__name__],
        names=[task.__name__.lower()],
    )


def describe_connections(connections: Any, kinds: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    """Return dataset type, storage class with dimensions, and doc."""
    for kind in kinds:
        for name in sorted(getattr(connections, kind)):
            item = getattr(connections, name)
            dimensions = ", ".join(sorted(getattr(item, "dimensions", ()))) or "no dimensions"
            yield item.name, f"{item.storageClass}; {dimensions}", item.doc


def describe_fields(config: Config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Return name, default and doc of each field, in the order of the code."""
    for name, field in config._fields.items():
        value = getattr(config, name)
        if name in ("connections", "saveLogOutput"):
            continue
        doc = field.doc
        if isinstance(field, ChoiceField):
            doc += " " + " ".join(f"{choice!r}: {text}" for choice, text in field.allowed.items() if choice)
        if isinstance(field, ConfigField):
            yield from describe_fields(value, f"{prefix}{name}.")
        elif hasattr(value, "keys"):
            yield prefix + name, ", ".join(map(str, value.keys())), doc
        else:
            yield prefix + name, repr(list(value) if hasattr(value, "append") else value), doc


def make_list(heading: str, items: list[tuple[str, str, str]]) -> nodes.Node:
    """Return a list of names with their meaning, under a heading."""
    result = nodes.definition_list()
    for name, value, doc in items:
        term = nodes.term("", "", nodes.literal("", name), nodes.Text("  "), nodes.literal("", value))
        result += nodes.definition_list_item("", term, nodes.definition("", nodes.paragraph("", doc)))
    return nodes.container("", nodes.rubric("", heading), result)


def setup(app: Sphinx) -> dict[str, bool]:
    """Tell Sphinx of the directive."""
    app.add_directive("pipeline-tasks", PipelineTasksDirective)
    return {"parallel_read_safe": True}
