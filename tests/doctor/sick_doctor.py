"""`python sick_doctor.py FAULT RECIPE ...`: the doctor on an engine with a fault. Its processes import this file."""

import os
import sys
from contextlib import ExitStack

from longred_megatron.errors import run_cli

if __name__ == "__main__":
    os.environ["DOCTOR_FAULT"] = sys.argv.pop(1)

from tests.doctor import faults

FAULT = ExitStack()  # a name, or the fault would end at once
FAULT.enter_context(getattr(faults, os.environ["DOCTOR_FAULT"])())

if __name__ == "__main__":
    from tools.doctor import main

    run_cli(main)
