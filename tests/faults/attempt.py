"""Starts a launcher with the next kill of a plan; the supervisor starts this again and again.

python -m tests.faults.attempt PLAN COMMAND...
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    plan, command = Path(sys.argv[1]), sys.argv[2:]
    kills = plan.read_text().splitlines()
    if kills:
        os.environ["SIGNAL"] = kills[0]
        plan.write_text("".join(f"{kill}\n" for kill in kills[1:]))
    os.execvp(command[0], command)
