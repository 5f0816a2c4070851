"""Start a launcher with the next fault of a plan; the supervisor starts this repeatedly.

    python -m tests.faults.attempt PLAN RECORD COMMAND...

PLAN has one fault per line, and RECORD one line per signal that a rank got: a fault that did not happen is tried
again.
"""

import os
import sys
from pathlib import Path

from tests.helpers.faults import FAULT

if __name__ == "__main__":
    plan, record, command = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    num_done = len(record.read_text().splitlines()) if record.exists() else 0
    pending = plan.read_text().splitlines()[num_done:]
    if pending:
        os.environ[FAULT] = pending[0]
    os.execvp(command[0], command)
