# Pipelines that come from DRP-full.yaml of drp_pipe: a table of all objects
# of a tract, in which those of overlaps and parents of blends are no primary
# objects.
config.connections.objects = "objectTable_tract"
config.objectDimensions = "tract"
for owner in (config, *(config.nonLenses.values() if "nonLenses" in config else ())):
    for name in ("selection", "hostSelection"):
        if name in owner and getattr(owner, name):
            setattr(owner, name, ["detect_isPrimary", *getattr(owner, name)])
