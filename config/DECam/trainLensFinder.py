# Pixels of the sky map, and stamps of 9 arcsec.
config.pixelScale = 0.262
config.stampSize = 35
