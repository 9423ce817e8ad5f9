config.load("$MEAS_DEEPLEARN_DIR/config/ingredients/afw_coadds.py")
