"""What the data is like and what happens to it, counted and shown."""
