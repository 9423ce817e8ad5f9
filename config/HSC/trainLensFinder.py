# Pixels of the sky map, and stamps of 9 arcsec.
config.pixelScale = 0.168
config.stampSize = 53
