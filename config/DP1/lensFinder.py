# Data Preview 1 (LSSTComCam): afw coadds, and an object table of primary
# objects by tract.
config.connections.coadds = "deep_coadd"
config.coaddStorageClass = "ExposureF"
config.connections.objects = "object"
config.objectDimensions = "tract"
