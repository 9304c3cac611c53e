"""How a command ends: done, stopped, or refused in one sentence."""

import os
import signal
import sys
import threading
from collections.abc import Callable

from trainer.interrupts import Interrupted


def status(run: Callable[[], object], stopped: str = "Stopped; nothing was written.") -> int:
    """Run a command and return its exit status: 0, 130 where it was stopped, or 2 where it cannot be done.

    Every foreseeable failure is one sentence; what nobody foresaw keeps its traceback.

    Args:
        stopped: what to say where it was stopped without having saved.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` is Ctrl-C
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        run()
    except Interrupted as stop:
        print(f"Saved: {stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
