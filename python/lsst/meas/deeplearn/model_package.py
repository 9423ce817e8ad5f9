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

"""A trained network as one file and as one butler dataset."""

from __future__ import annotations

__all__ = (
    "ARCHITECTURES",
    "DATASET_TYPES",
    "MODEL_STORAGE_CLASS",
    "ModelPackage",
    "ModelPackageError",
    "ModelSettings",
    "chain_models",
    "find_models",
    "ingest_model",
    "list_models",
    "load_model",
)

import dataclasses
import functools
import hashlib
import importlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import safetensors
import safetensors.numpy
from astropy.table import Table

from lsst.daf.butler.registry import MissingDatasetTypeError
from lsst.resources import ResourcePath, ResourcePathExpression

from .preprocessing import Preprocessing

if TYPE_CHECKING:
    from uuid import UUID

    import torch

    from lsst.daf.butler import Butler, DataCoordinate, DatasetRef, DatasetType, DeferredDatasetHandle
    from lsst.daf.butler.registry import Registry

ARCHITECTURES: Mapping[str, str] = {
    "Cvae": "lsst.meas.deeplearn.galaxies.cvae.Cvae",
    "DeepLens": "lsst.meas.deeplearn.lenses.deeplens.DeepLens",
}
"""Networks that a model package may name, and where they are defined.

A network is a `torch.nn.Module` whose constructor takes the keyword
``in_bands`` and the entries of ``ModelSettings.network``.
"""

DATASET_TYPES: Mapping[str, str] = {
    "Cvae": "galaxy_cvae_model",
    "DeepLens": "deeplens_model",
}
"""Dataset types under which tasks look for models of these networks."""

MODEL_STORAGE_CLASS = "ArrowTable"
"""Storage class of model packages; every butler repository has it."""

FORMAT_VERSION = 1
"""Version of the layout of model packages."""

MAX_LOADED = 16
"""Number of model packages that a process keeps."""

SCALE_TOLERANCE = 0.02
"""Largest relative difference between the pixel scales of data and model
that needs no resampling."""


class ModelPackageError(ValueError):
    """Raised for a model package that is damaged or does not fit."""


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """What a network expects of its inputs."""

    bands: tuple[str, ...]
    """Names of the bands, in the order of the input channels."""

    pixel_scale: float
    """Side of a pixel in arcsec."""

    stamp_size: int
    """Side of the stamps in pixels."""

    preprocessing: Preprocessing = Preprocessing()
    """Scaling of the pixels."""

    network: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further arguments of the constructor of the network."""

    def __post_init__(self) -> None:
        if not self.bands or len(set(self.bands)) < len(self.bands):
            raise ValueError(f"A model needs bands, and each once; these are {self.bands}.")
        if not self.pixel_scale > 0:
            raise ValueError(f"The pixel scale must be positive; it is {self.pixel_scale}.")
        if self.stamp_size < 1 or self.stamp_size % 2 == 0:
            raise ValueError(f"Stamps have an odd number of pixels on a side, not {self.stamp_size}.")
        self.preprocessing.check_bands(len(self.bands))

    def to_json(self) -> str:
        """Return the settings as a JSON object."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["preprocessing"] = self.preprocessing.to_settings()
        values["network"] = dict(self.network)
        return json.dumps(values, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ModelSettings:
        """Make from the JSON object that `to_json` returns.

        Parameters
        ----------
        text
            The JSON object.
        """
        values = json.loads(text)
        return cls(
            bands=tuple(values["bands"]),
            pixel_scale=float(values["pixel_scale"]),
            stamp_size=int(values["stamp_size"]),
            preprocessing=Preprocessing.from_settings(values["preprocessing"]),
            network=dict(values["network"]),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class ModelPackage:
    """The weights of a network, with all that is needed to use them.

    Parameters are numpy arrays, so that packages can be moved about without
    loading torch.  Nothing is pickled and no code travels with the weights:
    ``architecture`` names an entry of `ARCHITECTURES`.
    """

    name: str
    """Name of the model, such as ``deeplens_gri``."""

    version: str
    """Version of the weights."""

    architecture: str
    """Key of `ARCHITECTURES`."""

    settings: ModelSettings
    """What the network expects of its inputs."""

    weights: Mapping[str, np.ndarray]
    """State of the network, by the names of its parameters."""

    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """How, on what and when the network was trained, its measured
    ``performance`` (whose ``summary`` is a line of text), seeds and code
    version; types that JSON has."""

    @property
    def digest(self) -> str:
        """The SHA-256 of all that the package says and of its weights."""
        return _compute_digest(self._to_metadata(), self.weights)

    def _to_metadata(self) -> dict[str, str]:
        """Return what the header says, but for the digest."""
        return {
            "format": f"meas_deeplearn model package {FORMAT_VERSION}",
            "name": self.name,
            "version": self.version,
            "architecture": self.architecture,
            "settings": self.settings.to_json(),
            "record": json.dumps(self.record, sort_keys=True),
        }

    def to_bytes(self) -> bytes:
        """Return the content of a ``.safetensors`` file."""
        metadata = self._to_metadata() | {"digest": self.digest}
        arrays = {name: _as_stored(array) for name, array in self.weights.items()}
        return _sort_metadata(safetensors.numpy.save(arrays, metadata))

    @classmethod
    def from_bytes(cls, content: bytes, source: str = "the model package") -> ModelPackage:
        """Make from the content of a ``.safetensors`` file.

        Parameters
        ----------
        content
            The content.
        source
            Where it comes from, for error messages.

        Raises
        ------
        ModelPackageError
            Raised if the content is truncated, damaged, not a model package,
            or names an architecture that does not exist here.
        """
        try:
            weights = safetensors.numpy.load(content)
            metadata = _read_metadata(content)
        except (safetensors.SafetensorError, ValueError, KeyError, struct.error) as err:
            raise ModelPackageError(
                f"{source} is not a readable safetensors file ({err}); it may be truncated. Fetch it again."
            ) from err
        if metadata.get("format") != f"meas_deeplearn model package {FORMAT_VERSION}":
            raise ModelPackageError(
                f"{source} is a safetensors file but not a meas_deeplearn model package of format "
                f"{FORMAT_VERSION} (its format says {metadata.get('format')!r})."
            )
        # Of the text as it was written: a later version may write it anew.
        if metadata.pop("digest", None) != _compute_digest(metadata, weights):
            raise ModelPackageError(
                f"{source} is not what was written (its SHA-256 differs). Fetch it again."
            )
        try:
            package = cls(
                name=metadata["name"],
                version=metadata["version"],
                architecture=metadata["architecture"],
                settings=ModelSettings.from_json(metadata["settings"]),
                weights=weights,
                record=json.loads(metadata["record"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as err:
            raise ModelPackageError(f"The header of {source} makes no sense: {err!r}.") from err
        if package.architecture not in ARCHITECTURES:
            raise ModelPackageError(
                f"{source} needs the architecture {package.architecture!r}, which this version of "
                f"meas_deeplearn does not have; it has {sorted(ARCHITECTURES)}."
            )
        return package

    def write(self, path: Path | str) -> None:
        """Write a ``.safetensors`` file.

        Parameters
        ----------
        path
            File to write.
        """
        Path(path).write_bytes(self.to_bytes())

    @classmethod
    def read(cls, path: ResourcePathExpression) -> ModelPackage:
        """Read a ``.safetensors`` file.

        Parameters
        ----------
        path
            Path or URI, such as
            ``eups://meas_deeplearn/models/deeplens_gri_1.safetensors``.

        Raises
        ------
        FileNotFoundError
            Raised if there is no such file.
        ModelPackageError
            Raised as by `from_bytes`.
        """
        return cls.from_bytes(ResourcePath(path).read(), source=str(path))

    def to_arrow(self) -> pa.Table:
        """Return the one-row table that is stored in a butler repository."""
        return pa.table(
            {
                "name": [self.name],
                "version": [self.version],
                "architecture": [self.architecture],
                "settings": [self.settings.to_json()],
                "record": [json.dumps(self.record, sort_keys=True)],
                "safetensors": pa.array([self.to_bytes()], type=pa.large_binary()),
            }
        )

    @classmethod
    def from_arrow(cls, table: pa.Table) -> ModelPackage:
        """Make from the table that `to_arrow` returns.

        Parameters
        ----------
        table
            Table with one row.

        Raises
        ------
        ModelPackageError
            Raised as by `from_bytes`, or if the table is no model package.
        """
        if (
            table.num_rows != 1
            or "safetensors" not in table.column_names
            or not isinstance(content := table["safetensors"][0].as_py(), bytes)
        ):
            raise ModelPackageError(
                "The dataset is not a model package: it needs one row with bytes in a column 'safetensors', "
                f"and has {table.num_rows} rows with columns {table.column_names}."
            )
        return cls.from_bytes(content, source="the model dataset")

    def check_bands(self, bands: Sequence[str]) -> None:
        """Check that data offer the bands of the model.

        Parameters
        ----------
        bands
            Names of the bands of the data.

        Raises
        ------
        ModelPackageError
            Raised if a band is missing.
        """
        if missing := [band for band in self.settings.bands if band not in bands]:
            raise ModelPackageError(
                f"Model {self.name} {self.version} needs bands {', '.join(self.settings.bands)}, but the "
                f"data have {', '.join(bands)}: {', '.join(missing)} missing.  Configure 'bands', or choose "
                "a model that was trained on these bands ('butler list-deeplearn-models')."
            )

    @functools.cached_property
    def network(self) -> torch.nn.Module:
        """The network of `make_network`, made once; not to be changed."""
        return self.make_network()

    def make_network(self) -> torch.nn.Module:
        """Return the network with its weights, ready for use, on the CPU.

        Raises
        ------
        ModelPackageError
            Raised if the weights or settings do not fit the architecture.
        """
        import torch

        module, _, name = ARCHITECTURES[self.architecture].rpartition(".")
        architecture = getattr(importlib.import_module(module), name)
        # Weights may be stored as float16; arrays from files are read-only.
        arrays = {
            key: value.astype(np.float32) if value.dtype.kind == "f" else value.copy()
            for key, value in self.weights.items()
        }
        state = {key: torch.from_numpy(array) for key, array in arrays.items()}
        try:
            network = architecture(in_bands=len(self.settings.bands), **self.settings.network)
            network.load_state_dict(state)
        except (RuntimeError, TypeError, ValueError) as err:
            raise ModelPackageError(
                f"The weights or settings of model {self.name} {self.version} do not fit its architecture "
                f"{self.architecture}: {err}"
            ) from err
        return network.eval()


def find_models(
    dataset_type: DatasetType, registry: Registry, data_id: DataCoordinate, collections: Any
) -> list[DatasetRef]:
    """Return the model packages of all input collections, as an ensemble.

    Of runs ``models/<name>/<version>`` only the first of each name counts, so
    that the order of collections chooses a version; any other run counts by
    itself.  It is the ``lookupFunction`` of a connection.

    Parameters
    ----------
    dataset_type
        Dataset type of the model packages.
    registry
        Where to look.
    data_id
        Not used: models have no dimensions.
    collections
        Collections to search, in order.
    """
    runs = list(registry.queryCollections(collections, flattenChains=True))
    try:
        found = {ref.run: ref for ref in registry.queryDatasets(dataset_type, collections=runs)}
    except MissingDatasetTypeError:
        return []
    names: dict[str, DatasetRef] = {}
    for run in runs:
        path = run.split("/")
        name = "/".join(path[:2]) if len(path) == 3 and path[0] == "models" else run
        if run in found:
            names.setdefault(name, found[run])
    return list(names.values())


_loaded: dict[UUID, ModelPackage] = {}


def load_model(handle: DeferredDatasetHandle) -> ModelPackage:
    """Read a model package from a repository, once in a process.

    Quanta that run one after the other in a process share what is loaded and
    compiled.  The last `MAX_LOADED` packages are kept.

    Parameters
    ----------
    handle
        The dataset.

    Raises
    ------
    ModelPackageError
        Raised as by `ModelPackage.from_arrow`.
    """
    # The ID of a dataset never names another content.
    package = _loaded.pop(handle.ref.id, None) or ModelPackage.from_arrow(handle.get())
    _loaded[handle.ref.id] = package
    while len(_loaded) > MAX_LOADED:
        del _loaded[next(iter(_loaded))]
    return package


def ingest_model(
    butler: Butler, package: ModelPackage, *, run: str | None = None, dataset_type: str | None = None
) -> DatasetRef:
    """Put a model package into a repository.

    Parameters
    ----------
    butler
        A writeable butler.
    package
        The package.
    run
        RUN collection, which is made if need be; by default
        ``models/<name>/v<version>``.
    dataset_type
        Name of the dataset type; by default that of the architecture in
        `DATASET_TYPES`, such as ``deeplens_model``.
    """
    from lsst.daf.butler import DatasetType

    run = run or f"models/{package.name}/v{package.version}"
    dataset_type = dataset_type or DATASET_TYPES[package.architecture]
    butler.collections.register(run)
    butler.registry.registerDatasetType(
        DatasetType(dataset_type, (), MODEL_STORAGE_CLASS, universe=butler.dimensions)
    )
    return butler.put(package.to_arrow(), dataset_type, run=run)


def chain_models(butler: Butler, chain: str, runs: Sequence[str]) -> None:
    """Make a CHAINED collection of models, which are an ensemble then.

    Parameters
    ----------
    butler
        A writeable butler.
    chain
        Name of the collection; a chain that exists already is replaced.
    runs
        RUN collections of the models.

    Raises
    ------
    ModelPackageError
        Raised if there is a collection of this name that is no chain.
    """
    from lsst.daf.butler import CollectionType
    from lsst.daf.butler.registry import CollectionTypeError

    try:
        butler.collections.register(chain, CollectionType.CHAINED)
        butler.collections.redefine_chain(chain, runs)
    except CollectionTypeError as err:
        raise ModelPackageError(f"{chain} is no chain but another collection; name another one.") from err


def list_models(butler: Butler, collections: str = "*") -> Table:
    """Return the model packages of a repository, without their weights.

    Parameters
    ----------
    butler
        A butler.
    collections
        Glob of the collections to search.

    Returns
    -------
    table
        Columns ``dataset_type``, ``run``, ``name``, ``version``,
        ``architecture``, ``bands``, ``pixel_scale`` (arcsec),
        ``stamp_size`` and ``performance`` (as measured in training).
    """
    rows = []
    for dataset_type in butler.registry.queryDatasetTypes(["*_model", "*_model_[0-9]*"]):
        if dataset_type.storageClass_name != MODEL_STORAGE_CLASS or dataset_type.dimensions:
            continue
        found = butler.query_datasets(
            dataset_type, collections=collections, find_first=False, explain=False, order_by="ingest_date"
        )
        for ref in found:
            columns = ["name", "version", "architecture", "settings", "record"]
            if not {*columns, "safetensors"} <= set(butler.get(ref.makeComponentRef("columns"))):
                continue
            (row,) = butler.get(ref, parameters={"columns": columns}).to_pylist()
            settings = ModelSettings.from_json(row["settings"])
            performance = json.loads(row["record"]).get("performance", {})
            rows.append(
                {
                    "dataset_type": dataset_type.name,
                    "run": ref.run,
                    "name": row["name"],
                    "version": row["version"],
                    "architecture": row["architecture"],
                    "bands": ",".join(settings.bands),
                    "pixel_scale": settings.pixel_scale,
                    "stamp_size": settings.stamp_size,
                    "performance": performance.get("summary", "not measured"),
                }
            )
    return Table(rows)


def _as_stored(array: np.ndarray) -> np.ndarray:
    """Return an array in the layout of a file, of the same shape."""
    # np.ascontiguousarray would give a scalar a dimension.
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def _compute_digest(metadata: Mapping[str, str], weights: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of a header and of named arrays."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(weights):
        array = _as_stored(weights[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _read_metadata(content: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file held in memory."""
    (length,) = struct.unpack("<Q", content[:8])
    return dict(json.loads(content[8 : 8 + length]).get("__metadata__", {}))


def _sort_metadata(content: bytes) -> bytes:
    """Order the header of a safetensors file, so that bytes repeat."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]
