"""What every program needs and no paper speaks of. Imported before torch, it makes Ctrl-C and SIGTERM one line each."""

import signal
import sys

STOPPED = "\nstopped: what was written is kept; a training run continues with --resume"


def excepthook(kind, error, traceback):
    print(STOPPED, file=sys.stderr) if kind is KeyboardInterrupt else sys.__excepthook__(kind, error, traceback)


sys.excepthook = excepthook
signal.signal(signal.SIGTERM, signal.default_int_handler)
