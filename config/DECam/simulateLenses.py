# Stamps of 9 arcsec, and 5 pixels on each side.
config.stampSize = 45
