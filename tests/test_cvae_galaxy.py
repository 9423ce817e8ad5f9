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


"""Tests of generated galaxies as profiles of GalSim and in its YAML files."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import galsim
import numpy as np
import pytest
import yaml
from astropy.table import Table

import lsst.meas.deeplearn.galaxies.cvae_galaxy
from lsst.meas.deeplearn.galaxies.conditions import ConditionError
from lsst.meas.deeplearn.galaxies.cvae_galaxy import CvaeCatalog, CvaeGalaxy, CvaeModel
from lsst.meas.deeplearn.model_package import ModelPackageError
from lsst.meas.deeplearn.tests import make_test_galaxy_model, make_test_model

PIXEL_SCALE = 0.06

ROOT = Path(__file__).parents[1]

SHIPPED = ROOT / "models" / "cvae_synthetic.safetensors"
"""The weights of the package."""


@pytest.fixture
def model_file(tmp_path: Path) -> str:
    """Return the path of a model."""
    path = tmp_path / "test_cvae.safetensors"
    make_test_galaxy_model().write(path)
    return str(path)


def make_galaxy(model_file: str, **kwargs: Any) -> CvaeGalaxy:
    """Return a galaxy of flux 10 inside the training set."""
    values = {"half_light_radius": 0.3, "magnitude": 22.0, "redshift": 0.8, "seed": 5, "flux": 10.0} | kwargs
    return CvaeGalaxy(model_file, **values)


def draw(profile: galsim.GSObject, scale: float = 0.06, n: int = 128, **kwargs: Any) -> np.ndarray:
    """Return an image of a profile."""
    return np.asarray(profile.drawImage(nx=n, ny=n, scale=scale, dtype=float, **kwargs).array)


def test_flux(model_file: str) -> None:
    """The flux is what was asked for, in k space and in images."""
    galaxy = make_galaxy(model_file)
    assert galaxy.flux == 10
    assert galaxy.kValue(0, 0) == pytest.approx(10, rel=1e-5)
    assert draw(galaxy, method="no_pixel").sum() == pytest.approx(10, rel=1e-3)
    assert draw(galsim.Convolve(galaxy, galsim.Moffat(beta=3, fwhm=0.7)), 0.2).sum() == pytest.approx(
        10, rel=0.01
    )
    assert galaxy.positive_flux - galaxy.negative_flux == pytest.approx(10, rel=1e-3)
    assert (2 * galaxy).flux == 20
    assert galaxy.withFlux(3).flux == pytest.approx(3)


def test_flux_of_the_magnitude(model_file: str) -> None:
    """Without a flux it is that of the AB magnitude in nJy."""
    assert make_galaxy(model_file, flux=None).flux == pytest.approx(10 ** (0.4 * (31.4 - 22.0)))


def test_profile_agrees_with_its_transform(model_file: str) -> None:
    """Drawing in real space and by FFT gives the same image."""
    galaxy = make_galaxy(model_file)
    psf = galsim.Gaussian(fwhm=0.3)
    by_fft = draw(galsim.Convolve(galaxy, psf), n=64)
    direct = draw(galaxy, n=128, method="no_pixel")
    assert galaxy.max_sb * PIXEL_SCALE**2 >= 0.95 * direct.max()
    transform = galaxy.drawKImage(nx=64, ny=64, scale=0.5)
    assert transform(3, -4) == pytest.approx(galaxy.kValue(1.5, -2.0), rel=1e-5)
    # A direct convolution, by summing shifted copies.
    y, x = np.indices(direct.shape) - 63.5
    for row, column in ((32, 32), (30, 35)):
        dy, dx = (row - 31.5) * PIXEL_SCALE - y * PIXEL_SCALE, (column - 31.5) * PIXEL_SCALE - x * PIXEL_SCALE
        kernel = galsim.Convolve(psf, galsim.Pixel(PIXEL_SCALE)).drawImage(
            nx=301, ny=301, scale=0.03, method="no_pixel"
        )
        values = kernel.array[np.round(dy / 0.03).astype(int) + 150, np.round(dx / 0.03).astype(int) + 150]
        assert (values * direct).sum() * (PIXEL_SCALE / 0.03) ** 2 == pytest.approx(
            by_fft[row, column], rel=1e-3
        )


def test_shoots_photons(model_file: str) -> None:
    """Photons make the image that the FFT makes."""
    profile = galsim.Convolve(make_galaxy(model_file, flux=1e5), galsim.Gaussian(fwhm=0.6))
    shot = draw(profile, 0.2, 48, method="phot", rng=galsim.BaseDeviate(1))
    expected = draw(profile, 0.2, 48)
    bright = expected > 100
    assert bright.sum() > 50
    chi2 = (shot - expected)[bright] ** 2 / expected[bright]
    # Photons of negative lobes of the interpolation add some noise.
    assert chi2.mean() == pytest.approx(1, abs=0.4)


def test_transformations(model_file: str) -> None:
    """It is sheared, dilated, magnified, rotated and shifted."""
    galaxy = make_galaxy(model_file)
    for k in ((1.0, 2.0), (-3.0, 0.5)):
        assert galaxy.dilate(2).kValue(*k) == pytest.approx(galaxy.kValue(2 * k[0], 2 * k[1]), rel=1e-6)
        assert galaxy.rotate(90 * galsim.degrees).kValue(*k) == pytest.approx(galaxy.kValue(k[1], -k[0]))
        assert abs(galaxy.shift(0.2, 0.3).kValue(*k)) == pytest.approx(abs(galaxy.kValue(*k)))
    assert galaxy.magnify(1.1).flux == pytest.approx(11)
    assert galaxy.lens(0.02, 0.01, 1.1).flux == pytest.approx(11)
    psf = galsim.Gaussian(fwhm=0.5)
    shapes = [
        galsim.Convolve(galaxy.shear(g1=g), psf)
        .drawImage(nx=64, ny=64, scale=0.15)
        .FindAdaptiveMom()
        .observed_shape.g1
        for g in (-0.02, 0.02)
    ]
    assert 0.01 < shapes[1] - shapes[0] < 0.05


def test_pickle_copy_and_repr(model_file: str) -> None:
    """It survives pickling and copying, and its repr evaluates to it."""
    galaxy = make_galaxy(model_file, gsparams=galsim.GSParams(folding_threshold=1e-3))
    names = {"galsim": galsim, "lsst": lsst}
    for other in (pickle.loads(pickle.dumps(galaxy)), copy.deepcopy(galaxy), eval(repr(galaxy), names)):
        assert other == galaxy
        assert hash(other) == hash(galaxy)
        np.testing.assert_array_equal(draw(other), draw(galaxy))
    sheared = galaxy.shear(g1=0.1)
    assert eval(repr(sheared), names | {"array": np.array}) == sheared
    assert "half_light_radius=0.3" in str(galaxy)


@pytest.mark.parametrize(
    "change",
    [{"seed": 6}, {"magnitude": 21.0}, {"redshift": 0.9}, {"half_light_radius": 0.4}, {"flux": 11.0}],
)
def test_different_galaxies_differ(model_file: str, change: dict[str, float]) -> None:
    """Everything that makes a galaxy counts."""
    galaxy, other = make_galaxy(model_file), make_galaxy(model_file, **change)
    assert galaxy != other
    assert not np.allclose(draw(galaxy), draw(other), rtol=1e-4, atol=0)


def test_gsparams(model_file: str) -> None:
    """Accuracy parameters reach the interpolated image."""
    galaxy = make_galaxy(model_file)
    fine = galaxy.withGSParams(folding_threshold=1e-4)
    assert fine.gsparams.folding_threshold == 1e-4
    assert fine.stepk <= galaxy.stepk
    assert fine._profile.gsparams.folding_threshold == 1e-4
    assert fine != galaxy


def test_orientations_are_random(model_file: str) -> None:
    """Seeds turn galaxies by any angle, mirrored or not."""
    model = CvaeModel(model_file)
    y, x = np.indices((64, 64)) - 31.5
    values = []
    for seed in range(40):
        image = draw(model.make_galaxy(0.3, 22.0, 0.8, seed=seed, flux=1.0), n=64)
        xx, yy, xy = ((image * product).sum() for product in (x * x, y * y, x * y))
        values.append([(xx - yy) / (xx + yy), 2 * xy / (xx + yy)])
    shapes = np.array(values)
    assert (np.abs(shapes.mean(axis=0)) < 4 * shapes.std(axis=0) / np.sqrt(40)).all()
    assert shapes.std() > 0.01


@pytest.mark.parametrize("half_light_radius", [0.15, 0.4])
def test_shear_response_of_the_stamp(tmp_path: Path, half_light_radius: float) -> None:
    """A stamp on the grid of the model responds to shear as the profile.

    To 2e-4 for an exponential disk under a ground-based PSF.
    """
    path = tmp_path / "large.safetensors"
    make_test_galaxy_model(size=128).write(path)
    galaxy = make_galaxy(str(path), flux=1.0)
    disk = galsim.Exponential(half_light_radius=half_light_radius)
    truth = galsim.Convolve(disk, galsim.Gaussian(fwhm=0.13))
    galaxy._image = truth.drawImage(nx=129, ny=129, scale=PIXEL_SCALE, method="no_pixel").array
    psf = galsim.Moffat(beta=3, fwhm=0.7)

    def compute_response(profile: galsim.GSObject) -> float:
        e1 = []
        for g1 in (-0.02, 0.02):
            image = galsim.Convolve(profile.shear(g1=g1), psf).drawImage(nx=64, ny=64, scale=0.2, dtype=float)
            e1.append(image.FindAdaptiveMom().observed_e1)
        return (e1[1] - e1[0]) / 0.04

    assert compute_response(galaxy) == pytest.approx(compute_response(truth), rel=2e-4)


@pytest.mark.parametrize("value", [float("nan"), 0.0, -1.0])
def test_impossible_radius(model_file: str, value: float) -> None:
    """Galaxies without size are refused."""
    with pytest.raises(ConditionError, match="no galaxy has"):
        make_galaxy(model_file, half_light_radius=value)


@pytest.mark.parametrize("value", [0.0, -3.0])
def test_flux_without_light(model_file: str, value: float) -> None:
    """As with any profile of GalSim, no or negative flux is what is drawn."""
    galaxy = make_galaxy(model_file, flux=value)
    assert galaxy.flux == value
    assert draw(galaxy).sum() == pytest.approx(value, rel=0.02)


def test_other_wrong_input(model_file: str, tmp_path: Path) -> None:
    """Bad seeds, fluxes, files and models say what is wrong."""
    with pytest.raises(ValueError, match="not negative"):
        make_galaxy(model_file, seed=-1)
    with pytest.raises(ValueError, match="finite"):
        make_galaxy(model_file, flux=float("nan"))
    with pytest.raises(ValueError, match="raise, clip or flag"):
        CvaeModel(model_file, outside="maybe")
    with pytest.raises(FileNotFoundError):
        CvaeModel(str(tmp_path / "none.safetensors"))
    lens_finder = tmp_path / "lens.safetensors"
    make_test_model().write(lens_finder)
    with pytest.raises(ModelPackageError, match="not a galaxy model"):
        CvaeModel(str(lens_finder))


def test_importing_loads_no_torch() -> None:
    """The module is imported by GalSim without loading a network library."""
    code = "import sys, lsst.meas.deeplearn.galaxies.cvae_galaxy; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def make_config(model_file: str, folder: Path, **catalog: Any) -> dict[str, Any]:
    """Return the content of a YAML file that draws nine galaxies."""
    rng = np.random.default_rng(1)
    columns = {
        "radius": rng.uniform(0.2, 0.6, 9),
        "mag": rng.uniform(20, 24, 9),
        "z": rng.uniform(0.4, 1.5, 9),
        "flux": rng.uniform(10, 100, 9),
    }
    Table(columns | catalog).write(folder / "catalog.fits", overwrite=True)
    text = f"""
        modules: [lsst.meas.deeplearn.galaxies.cvae_galaxy]
        input:
          cvae_model: {{file_name: {model_file}}}
          catalog: {{file_name: {folder}/catalog.fits}}
        psf: {{type: Moffat, beta: 3, fwhm: 0.7}}
        gal:
          type: CvaeGalaxy
          half_light_radius: {{type: Catalog, col: radius}}
          magnitude: {{type: Catalog, col: mag}}
          redshift: {{type: Catalog, col: z}}
          flux: {{type: Catalog, col: flux}}
          shear: {{type: G1G2, g1: 0.02, g2: 0.0}}
        image:
          type: Tiled
          nx_tiles: 3
          ny_tiles: 3
          stamp_size: 32
          pixel_scale: 0.2
          random_seed: 12
        output: {{dir: {folder}, file_name: out.fits}}
    """
    config: dict[str, Any] = yaml.safe_load(text)
    return config


def test_yaml(model_file: str, tmp_path: Path) -> None:
    """A YAML file draws galaxies with the fluxes of the catalogue."""
    config = make_config(model_file, tmp_path)
    image = run_config_file(config)
    flux = Table.read(tmp_path / "catalog.fits")["flux"]
    # Stamps of 6.4 arcsec hold most of the light.
    stamps = image.reshape(3, 32, 3, 32).sum(axis=(1, 3))
    np.testing.assert_allclose(stamps.ravel(), flux, rtol=0.15)
    np.testing.assert_array_equal(run_config_file(config), image)
    config["image"]["random_seed"] = 13
    assert not np.allclose(run_config_file(config), image, rtol=1e-3)


def run_config_file(config: dict[str, Any]) -> np.ndarray:
    """Return the image in the file that a configuration writes."""
    galsim.config.Process(copy.deepcopy(config))
    path = Path(config["output"]["dir"]) / config["output"]["file_name"]
    return np.array(galsim.fits.read(str(path)).array)


def make_catalog_config(model_file: str, folder: Path, **catalog: Any) -> dict[str, Any]:
    """Return a YAML file like that of `make_config`, drawn in a batch."""
    config = make_config(model_file, folder, **catalog)
    config["input"] = {
        "cvae_catalog": {
            "model": model_file,
            "file_name": str(folder / "catalog.fits"),
            "half_light_radius": "radius",
            "magnitude": "mag",
            "redshift": "z",
            "flux": "flux",
            "batch_size": 4,
        }
    }
    config["gal"] = {"type": "CvaeCatalogGalaxy", "shear": {"type": "G1G2", "g1": 0.02, "g2": 0.0}}
    return config


def test_yaml_with_a_batch(model_file: str, tmp_path: Path) -> None:
    """A catalogue is drawn at once, the same with one and two processes."""
    config = make_catalog_config(model_file, tmp_path)
    image = run_config_file(config)
    flux = Table.read(tmp_path / "catalog.fits")["flux"]
    stamps = image.reshape(3, 32, 3, 32).sum(axis=(1, 3))
    np.testing.assert_allclose(stamps.ravel(), flux, rtol=0.15)
    config["image"]["nproc"] = 2
    np.testing.assert_array_equal(run_config_file(config), image)
    config["gal"]["index"] = {"type": "Sequence", "first": 8, "step": -1}
    turned = run_config_file(config)
    stamps = [part.reshape(3, 32, 3, 32).swapaxes(1, 2) for part in (image, turned)]
    np.testing.assert_array_equal(stamps[1], stamps[0][::-1, ::-1])
    config["image"]["random_seed"] = 13
    assert not np.allclose(run_config_file(config), turned, rtol=1e-3)


def test_batches_are_single_galaxies(model_file: str, tmp_path: Path) -> None:
    """A galaxy of a batch is the one that its repr makes."""
    config = make_catalog_config(model_file, tmp_path)
    catalog = CvaeCatalog(**config["input"]["cvae_catalog"], rng=galsim.BaseDeviate(3))
    assert catalog.getNObjects() == 9
    galaxy = catalog.make_galaxy(5)
    other = eval(repr(galaxy), {"galsim": galsim, "lsst": lsst})
    assert galaxy == other
    np.testing.assert_allclose(draw(galaxy), draw(other), atol=1e-5 * draw(other).max())
    with pytest.raises(IndexError, match="no galaxy 9"):
        catalog.make_galaxy(9)


@pytest.mark.parametrize(
    ("catalog", "message"),
    [({"mag": np.full(9, 29.0)}, "magnitude 29.00"), ({"radius": np.full(9, np.nan)}, "no galaxy has")],
)
def test_batch_outside_the_training_set(
    model_file: str, tmp_path: Path, catalog: dict[str, np.ndarray], message: str
) -> None:
    """Catalogues with other galaxies, or none, are refused."""
    config = make_catalog_config(model_file, tmp_path, **catalog)
    with pytest.raises(ConditionError, match=message):
        run_config_file(config)
    config["input"]["cvae_catalog"]["redshift"] = "photoz"
    with pytest.raises(KeyError, match="no columns .*photoz"):
        run_config_file(config)


@pytest.mark.parametrize("value", [float("nan"), 0.0, -3.0])
def test_batch_without_flux(model_file: str, tmp_path: Path, value: float) -> None:
    """A flux that is missing, zero or negative is named with its row."""
    flux = np.full(9, 5.0)
    flux[4] = value
    config = make_catalog_config(model_file, tmp_path, flux=flux)
    with pytest.raises(ValueError, match="1 of 9 .* no positive flux in column 'flux', such as row 4"):
        run_config_file(config)


def test_yaml_with_processes(model_file: str, tmp_path: Path) -> None:
    """One and two processes, and another order, draw the same galaxies."""
    config = make_config(model_file, tmp_path)
    expected = run_config_file(config)
    config["image"]["nproc"] = 2
    np.testing.assert_array_equal(run_config_file(config), expected)
    config["image"] |= {"nproc": 1, "order": "column"}
    other = run_config_file(config)
    stamps = [image.reshape(3, 32, 3, 32).swapaxes(1, 2) for image in (expected, other)]
    np.testing.assert_array_equal(stamps[1], stamps[0].swapaxes(0, 1))


@pytest.mark.parametrize(
    ("outside", "fails"), [(None, True), ("raise", True), ("clip", False), ("flag", False)]
)
def test_yaml_outside_the_training_set(
    model_file: str, tmp_path: Path, outside: str | None, fails: bool
) -> None:
    """Galaxies outside the training set do what the file says."""
    config = make_config(model_file, tmp_path, mag=np.full(9, 29.0))
    if outside is not None:
        config["input"]["cvae_model"]["outside"] = outside
    if fails:
        with pytest.raises(ConditionError, match="magnitude 29.00"):
            run_config_file(config)
    else:
        assert np.isfinite(run_config_file(config)).all()


def test_yaml_without_column(model_file: str, tmp_path: Path) -> None:
    """A column that the catalogue lacks is named."""
    config = make_config(model_file, tmp_path)
    config["gal"]["redshift"]["col"] = "photoz"
    with pytest.raises(Exception, match="photoz"):
        run_config_file(config)


def test_galsim_executable(model_file: str, tmp_path: Path) -> None:
    """The command of GalSim draws what its Python functions draw."""
    config = make_config(model_file, tmp_path)
    expected = run_config_file(config)
    (tmp_path / "out.fits").unlink()
    path = tmp_path / "galaxies.yaml"
    path.write_text(yaml.safe_dump(config))
    subprocess.run([Path(sys.executable).with_name("galsim"), str(path)], check=True, capture_output=True)
    np.testing.assert_array_equal(galsim.fits.read(str(tmp_path / "out.fits")).array, expected)


def test_model_is_known_by_its_content(model_file: str, tmp_path: Path) -> None:
    """Two files of the same model are not the same, but their digest is."""
    other = tmp_path / "other.safetensors"
    other.write_bytes(Path(model_file).read_bytes())
    assert CvaeModel(model_file).digest == CvaeModel(str(other)).digest
    changed = dataclasses.replace(make_test_galaxy_model(), version="2")
    changed.write(other)
    assert CvaeModel(model_file).digest != CvaeModel(str(other)).digest
    assert CvaeModel(model_file) == CvaeModel(model_file)


@pytest.mark.skipif(not SHIPPED.exists(), reason="needs the shipped weights")
def test_documented_file(tmp_path: Path) -> None:
    """The YAML file of the documentation draws galaxies that ship."""
    config = yaml.safe_load((ROOT / "doc" / "examples" / "galaxies.yaml").read_text())
    config["image"] |= {"nx_tiles": 3, "ny_tiles": 2}
    config["output"]["dir"] = str(tmp_path)
    image = run_config_file(config)
    assert image.shape == (80, 120)
    peaks = image.reshape(2, 40, 3, 40).max(axis=(1, 3))
    # The noise has 5 nJy; the faintest galaxies do not stand out.
    assert np.median(peaks) > 25
    config["image"]["nproc"] = 2
    np.testing.assert_array_equal(run_config_file(config), image)


@pytest.mark.skipif(not SHIPPED.exists(), reason="needs the shipped weights")
def test_shipped_galaxies_have_the_radius_asked_for() -> None:
    """Half of the light is inside the radius, and nothing is negative."""
    model = CvaeModel(str(SHIPPED), "clip")
    ratios = []
    for seed in range(24):
        galaxy = model.make_galaxy(0.4, 23.0, 0.8, seed=seed, flux=1.0)
        image = galaxy.drawImage(nx=129, ny=129, scale=0.06, method="no_pixel")
        assert image.array.min() > -2e-3 * image.array.max()
        ratios.append(image.calculateHLR(flux=1.0) / np.hypot(0.4, 0.065))
    assert np.median(ratios) == pytest.approx(1, abs=0.07)
