"""Print the summaries of several runs as a Markdown table, with mean and standard deviation.

    python train/compare.py runs/coded-* runs/plain-*

Runs whose folders differ only in a final number (`coded-0`, `coded-1`) are one group.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from coded_resnext.files import read_json
from coded_resnext.interpret.comparing import summary_table
from coded_resnext.training.run_folder import SUMMARY_FILE


def main() -> int:
    """Read the folders and print the table; 2 when a run has no summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    groups: dict[str, list[Any]] = {}
    for folder in parser.parse_args().runs:
        path = folder / SUMMARY_FILE
        if not path.exists():
            print(f"compare.py: {path}: no summary; is the run finished?", file=sys.stderr)
            return 2
        group = re.sub(r"[-_]?\d+$", "", folder.resolve().name)
        groups.setdefault(group, []).append(read_json(path))
    print(summary_table(groups))
    return 0


if __name__ == "__main__":
    sys.exit(main())
