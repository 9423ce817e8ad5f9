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

"""A Sphinx directive that describes a pipeline task from its code.

``.. pipeline-task:: NAME`` lists what the task reads and writes and the fields
of its configuration with their defaults.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from lsst.pex.config import ChoiceField, Config, ConfigField


class PipelineTaskDirective(SphinxDirective):
    """Describe the pipeline task whose full name is the argument."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module, name = self.arguments[0].rsplit(".", 1)
        task = getattr(importlib.import_module(module), name)
        config = task.ConfigClass()
        connections = config.ConnectionsClass(config=config)
        dimensions = ", ".join(sorted(connections.dimensions)) or "none"
        summary = task.__doc__.strip().splitlines()[0]
        return [
            nodes.paragraph("", summary),
            nodes.paragraph("", "", nodes.strong("", "Module: "), nodes.literal("", module)),
            nodes.paragraph("", "", nodes.strong("", "Dimensions: "), nodes.Text(dimensions)),
            *(
                make_list(heading, list(describe_connections(connections, kinds)))
                for heading, kinds in (("Reads", ("prerequisiteInputs", "inputs")), ("Writes", ("outputs",)))
            ),
            make_list("Configuration", list(describe_fields(config))),
        ]


def describe_connections(connections: Any, kinds: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    """Return dataset type, storage class with dimensions, and doc."""
    for kind in kinds:
        for name in sorted(getattr(connections, kind)):
            item = getattr(connections, name)
            dimensions = ", ".join(sorted(item.dimensions)) or "no dimensions"
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
    app.add_directive("pipeline-task", PipelineTaskDirective)
    return {"parallel_read_safe": True}
