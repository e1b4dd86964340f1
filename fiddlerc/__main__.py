"""`fiddlerc` and `python -m fiddlerc`: says what to install where the compiler's packages are missing."""

from __future__ import annotations

import io
import signal
import sys


def main() -> None:
    """Runs the command line; exits with its status. One that is told to stop removes what is half done: 143, 129."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda told, _: sys.exit(128 + told))
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that the locale cannot write
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        from .cli import run_command_line
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except MemoryError:
        print("error: not enough memory to start", file=sys.stderr)
        print("hint: ulimit -v   (what this shell permits), free -g", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("fiddlerc", "fiddler_runtime"):
            raise
        print(f"error: the compiler's packages are not installed: found no module {error.name!r}", file=sys.stderr)
        print("hint: pip install '.[compiler,hf]'   (in fiddlerc's own folder)", file=sys.stderr)
        sys.exit(1)
    sys.exit(run_command_line(sys.argv[1:]))


if __name__ == "__main__":
    main()
