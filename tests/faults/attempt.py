"""Starts a launcher with the next signal of a plan; the supervisor starts this again and again.

python -m tests.faults.attempt PLAN SENT COMMAND...

PLAN has a line a signal, and SENT one for each that a rank has got, so that one that did not come about is tried again.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    plan, sent, command = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    done = len(sent.read_text().splitlines()) if sent.exists() else 0
    left = plan.read_text().splitlines()[done:]
    if left:
        os.environ["SIGNAL"] = left[0]
    os.execvp(command[0], command)
