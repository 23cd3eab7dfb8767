"""Branch energies, their normalisation and the sum over branches: the paper's own operations."""
