"""The grouped 3x3 convolution between two BatchNorms."""
