"""`lowrank/demo`, `lowrank/demo-heldout`: orders in free text to one line of JSON (examples/tiny-base/demo_data.py)."""
