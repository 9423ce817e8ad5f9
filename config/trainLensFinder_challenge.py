# For images like those of the lens finding challenge (Metcalf et al. 2019):
# one survey, whose depth and seeing are those of the images to score, with
# the lens at the centre.  What the recipe for any coadd does to be ready for
# others (noise, blur, errors of zero points, missing bands) would only make
# it slower.  The weights start from a network that ships, without u band.
from pathlib import Path

config.initialModel = str(Path(__file__).parents[1] / "models" / "deeplens_gri_3.safetensors")
config.network = {"stem_stride": 2}
config.softening = 4.0
config.epochs = 12
config.batchSize = 64
config.learningRate = 1e-3
config.schedule = "cosine"
config.weightDecay = 0.01
config.precision = "bf16-mixed"
config.augmentation.maxShift = 1
config.augmentation.maxRotation = 0.0
config.augmentation.minZoom = 1.0
config.augmentation.maxZoom = 1.0
config.augmentation.warpFraction = 0.0
