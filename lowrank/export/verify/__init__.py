"""Is what was written the model that was trained? Read back and compared."""
