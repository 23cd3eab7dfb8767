"""BatchNorm between two convolutions: from partial sums to a map of each channel, and back."""
