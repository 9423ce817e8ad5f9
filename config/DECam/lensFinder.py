# DECam: afw coadds of 0.263 arcsec pixels (stamps are resampled to the scale
# of the model), and an object table by tract with duplicates and parents.
config.connections.coadds = "deepCoadd_calexp"
config.coaddStorageClass = "ExposureF"
config.connections.objects = "objectTable_tract"
config.objectDimensions = "tract"
config.selection = ["detect_isPrimary", "refExtendedness > 0.5", "mag(i_cModelFlux) < 23"]
