# A recipe for coadds that are not all alike: centres that are off by up to 3
# pixels, seeing up to a quarter wider than 0.7 arcsec, depths from 10 years to
# a sixtieth of that, errors of zero points and sky, and now and then a band
# without data or an area that is masked.
# Where one band of three is missing its pixels are 0; stamps of two bands are
# not imitated.
config.softening = 4.0
config.epochs = 40
config.batchSize = 64
config.learningRate = 2e-3
config.schedule = "cosine"
config.weightDecay = 0.01
config.kindWeights = {"host": 4.0}
config.augmentation.maxShift = 3
config.augmentation.maxRotation = 180.0
config.augmentation.minZoom = 0.9
config.augmentation.maxZoom = 1.1
config.augmentation.warpFraction = 0.2
config.augmentation.maxBlur = 1.1
config.augmentation.maxNoise = 8.0
config.augmentation.minArcSnr = 14.0
config.augmentation.fluxScatter = 0.1
config.augmentation.offsetScatter = 0.1
config.augmentation.missingBandFraction = 0.05
config.augmentation.maskedFraction = 0.15
