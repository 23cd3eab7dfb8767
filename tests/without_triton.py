"""A pytest plugin, `-p without_triton`: as where Triton is not installed.

Processes that tests start are not told.
"""

import sys

sys.modules["triton"] = None  # type: ignore[assignment]
