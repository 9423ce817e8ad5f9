# The recipe of CMU DeepLens (Lanusse et al. 2018, MNRAS 473, 3895): ADAM,
# batches of 128, 120 epochs, a rate of 1e-3 that is divided by ten after each
# third, flips, rotations, zoom 0.9 to 1, linear pixels clipped at 250 sigma.
# It differs in the units of pixels, which are those of the noise of each
# stamp, and in the edges of turned stamps, which mirror instead of wrapping.
config.network = {}
config.softening = 0.0
config.epochs = 120
config.batchSize = 128
config.learningRate = 1e-3
config.schedule = "step"
config.members = 1
config.kindWeights = {}
config.weightDecay = 0.0
config.precision = "32-true"
config.augmentation.maxShift = 0
config.augmentation.maxRotation = 90.0
config.augmentation.minZoom = 0.9
config.augmentation.maxZoom = 1.0
config.augmentation.warpFraction = 1.0
config.augmentation.maxBlur = 0.0
config.augmentation.maxNoise = 1.0
config.augmentation.minArcSnr = 0.0
config.augmentation.fluxScatter = 0.0
config.augmentation.offsetScatter = 0.0
config.augmentation.missingBandFraction = 0.0
config.augmentation.maskedFraction = 0.0
