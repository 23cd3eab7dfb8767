"""The residual sum that ends a block, and the statistics of a map."""
