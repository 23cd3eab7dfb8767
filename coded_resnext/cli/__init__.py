"""The command line: `coded-resnext`, one module for each command, and the training scripts."""
