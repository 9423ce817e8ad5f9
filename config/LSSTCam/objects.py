# The primary objects of a tract.
config.connections.objects = "object"
config.objectDimensions = "tract"
