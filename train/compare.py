"""Print the summaries of several runs as a Markdown table, with mean and standard deviation.

    python train/compare.py runs/coded-* runs/plain-*

Runs whose recipes differ in nothing but the seed are one group. Below the table is which runs are
in a group, and what its recipe has other than the first one's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from coded_resnext.cli.main import ended_by_interrupt

with ended_by_interrupt():
    from coded_resnext.files import say
    from coded_resnext.interpret.comparing import describe_groups, group_runs, summary_table
    from coded_resnext.training.processes import run_script


def compare(runs: list[Path]) -> None:
    """Read the folders and print the table."""
    groups = group_runs(runs)
    say(summary_table({g.name: [summary for _, summary in g.runs.values()] for g in groups}))
    say(f"\n{describe_groups(groups)}")


def main() -> int:
    """Run the command; 2 when a run has no summary or the input is at fault otherwise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    arguments = parser.parse_args()
    return run_script("compare.py", lambda: compare(arguments.runs))


if __name__ == "__main__":
    sys.exit(main())
