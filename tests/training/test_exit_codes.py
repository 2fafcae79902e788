"""How a rank ends: like `sys.exit`, short of taking the interpreter down."""

from __future__ import annotations

import subprocess
import sys

from tests.ranks import ROOT

PROGRAM = """
import atexit, sys, threading, time
from training.exit_codes import leave_process

class Object:
    def __del__(self):
        print("taken down", flush=True)

kept = Object()
atexit.register(lambda: print("handlers"))
threading.Thread(target=lambda: (time.sleep(0.3), print("threads")), daemon=False).start()
threading.Thread(target=lambda: time.sleep(60), daemon=True).start()
sys.stdout.write("no line break")
leave_process(85)
"""


def test_threads_handlers_and_output_are_waited_for_and_nothing_is_taken_down():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 85
    assert done.stdout == "no line breakthreads\nhandlers\n"
