"""From batches to a trained network in a folder that survives."""
