config.load("$MEAS_DEEPLEARN_DIR/config/ingredients/object_table.py")
