"""What each way to quantize would do to a checkpoint: measured (measures.py), and as a picture (plot.py)."""
