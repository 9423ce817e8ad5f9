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


"""Tests of model packages: files, datasets, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy
import torch

from lsst.daf.butler import Butler, DatasetType
from lsst.meas.deeplearn.model_package import (
    ARCHITECTURES,
    FORMAT_VERSION,
    ModelPackage,
    ModelPackageError,
    ModelSettings,
    ingest_model,
    list_models,
)
from lsst.meas.deeplearn.preprocessing import Preprocessing


class TinyNetwork(torch.nn.Module):
    """A network of one convolution, for tests.

    Parameters
    ----------
    in_bands
        Number of bands.
    channels
        Number of maps.
    """

    def __init__(self, *, in_bands: int, channels: int = 2) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(in_bands, channels, 3)
        self.norm = torch.nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)).mean(dim=(1, 2, 3))


@pytest.fixture(autouse=True)
def _register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "Tiny", f"{__name__}.TinyNetwork")


def _make_package(**kwargs: Any) -> ModelPackage:
    """Make a package of a tiny network for three bands."""
    torch.manual_seed(4)
    network = TinyNetwork(in_bands=3)
    arguments: dict[str, Any] = {
        "name": "tiny_gri",
        "version": "v3",
        "architecture": "Tiny",
        "settings": ModelSettings(
            bands=("g", "r", "i"),
            pixel_scale=0.2,
            stamp_size=11,
            preprocessing=Preprocessing(noise=(1.0, 2.0, 3.0), mean=(0.1, 0.2, 0.3), softening=3.0),
            network={"channels": 2},
        ),
        "weights": {key: value.numpy() for key, value in network.state_dict().items()},
        "record": {"seed": 4, "trained_on": "noise", "performance": {"auc": 0.5, "summary": "AUROC 0.5"}},
    }
    return ModelPackage(**(arguments | kwargs))


def _assert_equal(a: ModelPackage, b: ModelPackage) -> None:
    """Raise unless two packages are the same."""
    for name in ("name", "version", "architecture", "settings", "record", "digest"):
        assert getattr(a, name) == getattr(b, name), name
    assert set(a.weights) == set(b.weights)
    for name, array in a.weights.items():
        np.testing.assert_array_equal(b.weights[name], array, err_msg=name)
        assert b.weights[name].dtype == array.dtype, name
        assert b.weights[name].shape == array.shape, name


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header and the data of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _join(header: dict[str, Any], data: bytes) -> bytes:
    """Put a safetensors file together again."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def test_file_goes_round(tmp_path: Path) -> None:
    """A package is the same after it was written and read."""
    package = _make_package()
    package.write(tmp_path / "tiny.safetensors")
    _assert_equal(ModelPackage.read(tmp_path / "tiny.safetensors"), package)
    _assert_equal(ModelPackage.read(str(tmp_path / "tiny.safetensors")), package)


def test_file_is_a_safetensors_file() -> None:
    """Any safetensors reader can read the weights and the record."""
    package = _make_package()
    content = package.to_bytes()
    weights = safetensors.numpy.load(content)
    assert set(weights) == set(package.weights)
    metadata = _split(content)[0]["__metadata__"]
    assert json.loads(metadata["record"]) == package.record
    assert metadata["architecture"] == "Tiny"


def test_table_goes_round() -> None:
    """The table has one row, with columns to read without the weights."""
    package = _make_package()
    table = package.to_arrow()
    assert table.num_rows == 1
    assert table.schema.field("safetensors").type == pa.large_binary()
    assert json.loads(table["record"][0].as_py()) == package.record
    assert ModelSettings.from_json(table["settings"][0].as_py()) == package.settings
    _assert_equal(ModelPackage.from_arrow(table), package)


@pytest.fixture
def butler(tmp_path: Path) -> Iterator[Butler]:
    """Make an empty repository."""
    Butler.makeRepo(str(tmp_path / "repository"))
    with Butler.from_config(str(tmp_path / "repository"), writeable=True) as butler:
        yield butler


def test_dataset_goes_round(butler: Butler) -> None:
    """Versions of a model are RUN collections of one dataset type."""
    first, second = _make_package(), _make_package(version="v4")
    for package in (first, second):
        run = f"models/tiny/{package.version}"
        ref = ingest_model(butler, package, run=run, dataset_type="tiny_model")
        assert ref.run == run
        assert ref.datasetType.storageClass_name == "ArrowTable"
    for package, collections in [(first, ["models/tiny/v3", "models/tiny/v4"]), (second, "models/tiny/v4")]:
        table = butler.get("tiny_model", collections=collections)
        _assert_equal(ModelPackage.from_arrow(table), package)


def test_models_are_listed(butler: Butler) -> None:
    """The list has each model once, and is not upset by other tables."""
    ingest_model(butler, _make_package(), run="models/tiny/v3", dataset_type="tiny_model")
    ingest_model(butler, _make_package(version="v4"), run="models/tiny/v4", dataset_type="tiny_model")
    for name, dtype in (("foreign_model", "ArrowTable"), ("other_model", "StructuredDataDict")):
        butler.registry.registerDatasetType(DatasetType(name, (), dtype, universe=butler.dimensions))
    butler.put(pa.table({"x": [1]}), "foreign_model", run="models/tiny/v3")
    table = list_models(butler)
    assert sorted(table["version"]) == ["v3", "v4"]
    assert set(table["bands"]) == {"g,r,i"}
    assert set(table["performance"]) == {"AUROC 0.5"}
    assert len(list_models(butler, "models/*/v4")) == 1
    assert len(list_models(butler, "nothing*")) == 0


def test_same_package_has_the_same_bytes() -> None:
    """Bytes do not depend on the order of weights, settings or record."""
    package = _make_package()
    other = dataclasses.replace(
        package,
        weights=dict(reversed(package.weights.items())),
        record=dict(reversed(package.record.items())),
    )
    assert other.to_bytes() == package.to_bytes()
    assert other.digest == package.digest


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"version": "v4"},
        {"record": {"seed": 5}},
        {"settings": ModelSettings(bands=("g",), pixel_scale=0.2, stamp_size=11)},
        {"weights": {"conv.bias": np.zeros(2, np.float32)}},
    ],
)
def test_digest_tells_packages_apart(change: dict[str, Any]) -> None:
    """The digest depends on all that a package holds."""
    assert _make_package(**change).digest != _make_package().digest


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64", "uint8", "bool", ">f4"])
def test_weights_of_any_type_and_layout(dtype: str) -> None:
    """Scalars, empty and transposed arrays keep type and shape."""
    rng = np.random.default_rng(1)
    weights = {
        "scalar": np.array(1, dtype=dtype),
        "empty": np.zeros((0, 3), dtype=dtype),
        "transposed": rng.integers(0, 2, size=(3, 4)).astype(dtype).T,
        "strided": rng.integers(0, 2, size=(6, 4)).astype(dtype)[::2],
    }
    read = ModelPackage.from_bytes(_make_package(weights=weights).to_bytes())
    for name, array in weights.items():
        np.testing.assert_array_equal(read.weights[name], array, err_msg=name)
        assert read.weights[name].shape == array.shape
        assert read.weights[name].dtype == array.dtype.newbyteorder("=")


def test_truncated_files_are_refused() -> None:
    """A file that ends too early is refused, wherever it ends."""
    content = _make_package().to_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for length in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(content) - 1):
        with pytest.raises(ModelPackageError, match=r"here is not a readable .*truncated. Fetch it again"):
            ModelPackage.from_bytes(content[:length], source="here")
    with pytest.raises(ModelPackageError):
        ModelPackage.from_bytes(content + b"x")


def test_changed_bytes_are_refused() -> None:
    """A change of any one byte, of header or weights, is noticed."""
    package = _make_package()
    content = package.to_bytes()
    _, data = _split(content)
    header_end = len(content) - len(data)
    for position in range(0, len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1
        with pytest.raises(ModelPackageError):
            ModelPackage.from_bytes(bytes(flipped), source=f"byte {position} of {header_end}")


def test_changed_weights_or_words_are_named() -> None:
    """A well-formed file that is not what was written says so."""
    header, data = _split(_make_package().to_bytes())
    changed = bytearray(data)
    changed[-1] ^= 1
    with pytest.raises(ModelPackageError, match=r"here is not what was written \(its SHA-256 differs\)"):
        ModelPackage.from_bytes(_join(header, bytes(changed)), source="here")
    header["__metadata__"]["record"] = '{"performance": {"auc": 1.0}}'
    with pytest.raises(ModelPackageError, match="SHA-256 differs"):
        ModelPackage.from_bytes(_join(header, data))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable safetensors file"),
        (pickle.dumps({"weights": np.zeros(300)}), "not a readable safetensors file"),
        (b"PK\x03\x04" + bytes(200), "not a readable safetensors file"),
        (_join([], b""), "not a readable safetensors file"),
        (_join({"__metadata__": []}, b""), "not a readable safetensors file"),
        (_join({}, b""), r"not a meas_deeplearn model package of format 1 \(its format says None\)"),
        (safetensors.numpy.save({"x": np.zeros(3)}), "not a meas_deeplearn model package"),
        (safetensors.numpy.save({"x": np.zeros(3)}, {"format": "pt"}), "its format says 'pt'"),
    ],
)
def test_foreign_files_are_refused(content: bytes, message: str) -> None:
    """Pickles, zip files and models of other programs are refused."""
    with pytest.raises(ModelPackageError, match=message):
        ModelPackage.from_bytes(content)


def test_files_of_torch_are_refused(tmp_path: Path) -> None:
    """A checkpoint of torch is refused, and not unpickled."""
    torch.save({"weights": torch.zeros(3)}, tmp_path / "model.pt")
    with pytest.raises(ModelPackageError, match=r"model\.pt is not a readable safetensors file"):
        ModelPackage.read(tmp_path / "model.pt")


def test_file_that_is_not_there(tmp_path: Path) -> None:
    """A missing file is a missing file."""
    with pytest.raises(FileNotFoundError):
        ModelPackage.read(tmp_path / "none.safetensors")


def test_other_versions_of_the_layout_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of a later layout says which layout it has."""
    with monkeypatch.context() as patch:
        patch.setattr("lsst.meas.deeplearn.model_package.FORMAT_VERSION", FORMAT_VERSION + 1)
        content = _make_package().to_bytes()
    with pytest.raises(
        ModelPackageError, match=r"format 1 \(its format says 'meas_deeplearn model package 2'"
    ):
        ModelPackage.from_bytes(content)


def test_unknown_architecture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An architecture that is not here is named, with those that are."""
    content = _make_package(architecture="HugeLens").to_bytes()
    with pytest.raises(
        ModelPackageError, match=r"needs the architecture 'HugeLens'.*it has \['Cvae', 'DeepLens', 'Tiny'\]"
    ):
        ModelPackage.from_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        {"bands": None},
        {"pixel_scale": "x"},
        {"preprocessing": []},
        {"preprocessing": {"gamma": 2}},
        {"preprocessing": {"mean": [1, 2]}},
        {"stamp_size": 10},
        {"network": 3},
        None,
    ],
)
def test_settings_that_make_no_sense_are_refused(
    change: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings that this version cannot apply are refused."""
    good = json.loads(ModelSettings(bands=("g",), pixel_scale=0.2, stamp_size=11).to_json())
    with monkeypatch.context() as patch:
        text = json.dumps(None if change is None else good | change)
        patch.setattr(ModelSettings, "to_json", lambda self: text)
        content = _make_package().to_bytes()
    with pytest.raises(ModelPackageError, match="The header of here makes no sense"):
        ModelPackage.from_bytes(content, source="here")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bands": ()}, "needs bands, and each once"),
        ({"bands": ("g", "g")}, "needs bands, and each once"),
        ({"pixel_scale": 0.0}, "pixel scale must be positive"),
        ({"pixel_scale": float("nan")}, "pixel scale must be positive"),
        ({"stamp_size": 44}, "odd number of pixels on a side, not 44"),
        ({"stamp_size": -1}, "odd number of pixels on a side, not -1"),
        ({"preprocessing": Preprocessing(noise=(1.0,))}, "There are 2 bands, but 1 values for the noise"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    """Settings that fit no network are refused before training."""
    arguments: dict[str, Any] = {"bands": ("g", "r"), "pixel_scale": 0.2, "stamp_size": 45}
    with pytest.raises(ValueError, match=message):
        ModelSettings(**(arguments | settings))


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"x": [1]}),
        pa.table({"safetensors": pa.array([], type=pa.large_binary())}),
        pa.table({"safetensors": pa.array([b"", b""], type=pa.large_binary())}),
        pa.table({"safetensors": pa.array([None], type=pa.large_binary())}),
        pa.table({"safetensors": ["text"]}),
    ],
)
def test_other_tables_are_refused(table: pa.Table) -> None:
    """A dataset of another kind is refused with what it has."""
    with pytest.raises(ModelPackageError, match=r"dataset is not a model package: it needs one row"):
        ModelPackage.from_arrow(table)


def test_damaged_dataset_is_refused() -> None:
    """A dataset with damaged weights is refused like a file."""
    content = _make_package().to_bytes()
    table = pa.table({"safetensors": pa.array([content[:-1]], type=pa.large_binary())})
    with pytest.raises(ModelPackageError, match="the model dataset is not a readable safetensors file"):
        ModelPackage.from_arrow(table)


def test_missing_bands() -> None:
    """A model whose bands the data lack says which, and what to do."""
    package = _make_package()
    package.check_bands(("i", "r", "g", "z"))
    with pytest.raises(
        ModelPackageError,
        match="tiny_gri v3 needs bands g, r, i, but the data have r, z: g, i missing.*Configure 'bands'",
    ):
        package.check_bands(["r", "z"])


def test_network_has_the_weights() -> None:
    """The network computes what the one computed that was packed."""
    torch.manual_seed(4)
    network = TinyNetwork(in_bands=3).eval()
    x = torch.randn(5, 3, 11, 11)
    package = ModelPackage.from_bytes(_make_package().to_bytes())
    copy = package.make_network()
    assert not copy.training
    with torch.no_grad():
        torch.testing.assert_close(copy(x), network(x), rtol=0, atol=0)
        # It does not share memory with the package.
        copy.conv.weight.zero_()
    assert package.weights["conv.weight"].any()


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_network_has_single_precision(dtype: type) -> None:
    """Weights of other precision become float32; counters stay integers."""
    package = _make_package()
    weights = {
        name: array.astype(dtype) if array.dtype.kind == "f" else array
        for name, array in package.weights.items()
    }
    state = dataclasses.replace(package, weights=weights).make_network().state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}
    for name, array in weights.items():
        np.testing.assert_allclose(state[name].numpy(), array, rtol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"weights": {}},
        {"weights": {"conv.weight": np.zeros((2, 1, 3, 3), np.float32)}},
        {"settings": ModelSettings(bands=("g", "r"), pixel_scale=0.2, stamp_size=11)},
        {"settings": ModelSettings(("g", "r", "i"), 0.2, 11, network={"channels": 3})},
        {"settings": ModelSettings(("g", "r", "i"), 0.2, 11, network={"colour": 3})},
        {"settings": ModelSettings(("g", "r", "i"), 0.2, 11, network={"channels": "many"})},
    ],
)
def test_weights_that_do_not_fit_are_refused(change: dict[str, Any]) -> None:
    """Weights or settings of another network are refused by name."""
    package = ModelPackage.from_bytes(_make_package(**change).to_bytes())
    with pytest.raises(ModelPackageError, match="model tiny_gri v3 do not fit its architecture Tiny"):
        package.make_network()


def test_models_move_without_torch(tmp_path: Path) -> None:
    """Reading, checking and writing a package does not load torch."""
    _make_package(architecture="DeepLens").write(tmp_path / "a.safetensors")
    code = """
import sys
from lsst.meas.deeplearn.model_package import ModelPackage
package = ModelPackage.read(sys.argv[1])
package.check_bands(package.settings.bands)
ModelPackage.from_arrow(package.to_arrow()).write(sys.argv[2])
assert "torch" not in sys.modules
"""
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=True)
    assert paths[0].read_bytes() == paths[1].read_bytes()
