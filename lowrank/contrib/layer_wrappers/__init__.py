"""Forward passes around decoder layers: one file each, as lowrank/models/layer_wrappers.py describes it."""
