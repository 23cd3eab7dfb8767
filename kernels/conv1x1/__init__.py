"""The 1x1 convolution between two BatchNorms."""
