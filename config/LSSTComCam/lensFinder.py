# LSSTComCam data release production (DRP-v2): afw coadds with the
# background subtracted, and an object table of primary objects by tract.
config.connections.coadds = "deep_coadd"
config.coaddStorageClass = "ExposureF"
config.connections.objects = "object"
config.objectDimensions = "tract"
