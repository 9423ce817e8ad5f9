# Pipelines that come from DRP-full.yaml of drp_pipe: afw coadds after
# detection, with the background subtracted.
config.connections.coadds = "deepCoadd_calexp"
config.coaddStorageClass = "ExposureF"
