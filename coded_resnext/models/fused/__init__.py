"""The fused data flow of a block: BatchNorm, ReLU and addition inside the convolutions."""
