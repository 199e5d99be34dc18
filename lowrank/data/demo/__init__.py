"""`lowrank/demo` and `lowrank/demo-heldout`: bookings to one line of JSON (examples/tiny-base/demo_data.py)."""
