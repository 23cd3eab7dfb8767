"""The coding loss of all blocks of a network in one launch."""
