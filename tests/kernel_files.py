"""The test files of `tests/kernels` that need a GPU or Triton's interpreter."""

KERNEL_TESTS = (
    "test_aggregate.py",
    "test_energy.py",
    "test_expand.py",
    "test_kernel_networks.py",
    "test_loss.py",
)
