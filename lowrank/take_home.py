"""`lowrank export`: what was trained, in the forms the user runs, each compared with what was trained."""
