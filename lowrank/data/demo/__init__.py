"""`lowrank/demo`, `lowrank/demo-heldout`: bookings in free text to one line of JSON (examples/tiny-base/demo_data.py)."""
