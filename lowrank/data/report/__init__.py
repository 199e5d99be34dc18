"""Reports on the data: its statistics, and what happens to its rows."""
