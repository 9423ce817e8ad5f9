# LSSTCam data release production in a repository at USDF: afw coadds with the
# background subtracted, and an object table of primary objects by tract.
config.connections.coadds = "deep_coadd"
config.coaddStorageClass = "ExposureF"
config.connections.objects = "object"
config.objectDimensions = "tract"
