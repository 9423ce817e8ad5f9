# The public data releases from DP2 on, and LSSTCam productions whose coadds
# were rewritten by rewrite-images.yaml of drp_pipe.  In a production whose
# coadds were not, set coaddStorageClass to ExposureF.
config.connections.coadds = "deep_coadd"
config.coaddStorageClass = "CellCoadd"
