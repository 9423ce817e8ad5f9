# Stamps of 9 arcsec.
config.stampSize = 53
