# Data Preview 2: cell coadds, and an object table of primary objects by tract.
config.connections.coadds = "deep_coadd"
config.coaddStorageClass = "CellCoadd"
config.connections.objects = "object"
config.objectDimensions = "tract"
