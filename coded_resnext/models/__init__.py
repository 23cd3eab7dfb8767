"""The network: block, whole, loss, decoding, and its weights in and out."""
