"""Triton's interpreter for the whole test process: it is chosen when a kernel is first imported.

What has to be compiled is compiled in processes of its own, with a clean environment.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"
