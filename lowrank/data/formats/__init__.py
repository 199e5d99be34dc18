"""Dataset formats: one function each, from a row to a record."""
