# Data Preview 1, and productions with DRP-v2.yaml of drp_pipe: afw coadds,
# with the background subtracted.
config.connections.coadds = "deep_coadd"
config.coaddStorageClass = "ExposureF"
