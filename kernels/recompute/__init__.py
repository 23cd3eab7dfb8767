"""The last convolution of a block, recomputed by its consumer instead of stored."""
