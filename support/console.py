"""How a command speaks and how it ends: the user's errors, standard streams, progress bars, Ctrl-C.

Imports no torch, so that a command that needs none starts at once.
"""
import contextlib
import functools
import os
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable

from tqdm import tqdm


class InputError(ValueError):
    """Something the user gave is wrong: one line that says what, where, and what to do."""


# ---------------------------------------------------------------- standard streams

class TolerantStream:
    """A text stream that writes what it can, so that a broken stream ends no training.

    Writing to a full disk, a closed terminal or a closed pipe does nothing. Characters that the
    encoding lacks are written as escape sequences. Where the stream is no terminal, the carriage
    returns of a progress bar become line feeds. A missing stream (None, as under pythonw) takes
    everything and shows nothing.
    """

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            if not self.stream.isatty():
                text = text.replace("\r", "\n")
            return self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding
            return self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError):                                # full, or closed
            return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def final_flush(self) -> None:
        """Flush for the last time. Where that fails, the stream's file becomes the null device,
        because Python's own flush at exit would fail as well."""
        try:
            self.stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextlib.contextmanager
def tolerant_streams():
    """Standard output and standard error as `TolerantStream`s, put back at the end."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (TolerantStream(stream) for stream in streams)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TolerantStream):
                stream.final_flush()
        sys.stdout, sys.stderr = streams


def printable(name: str) -> str:
    """A file's name for people: bytes that are no UTF-8 are written as escape sequences."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# ---------------------------------------------------------------- the end of a command

OUT_OF_MEMORY = ("error: the GPU's memory is full ({}); --recompute and a smaller --eval-batch "
                 "take less, and so does a smaller --batch, for a training with another --name")


def exit_status(command: Callable[..., int | None]) -> Callable[..., int]:
    """Decorate a command so that it returns its exit status.

    The status is the command's own, 0 where it returns nothing, 2 for a user's mistake or a full
    GPU, which is said in one line, and 130 for Ctrl-C. Of each kind of warning the first three are
    shown, and the number of the others at the end.
    """
    @functools.wraps(command)
    def run_command(*args) -> int:
        kinds: Counter = Counter()

        def show_warning(message, *_, **__) -> None:
            kind = str(message).split(": ")[-1][:12]
            kinds[kind] += 1
            if kinds[kind] <= 3:
                print(f"warning: {message}", file=sys.stderr)

        with tolerant_streams():
            try:
                with warnings.catch_warnings():
                    warnings.showwarning = show_warning
                    return command(*args) or 0
            except InputError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            except RuntimeError as error:
                if type(error).__name__ != "OutOfMemoryError":           # torch's
                    raise
                print(OUT_OF_MEMORY.format(str(error).split(". ")[0]), file=sys.stderr)
                return 2
            except KeyboardInterrupt as interrupt:
                print(f"\n{str(interrupt) or 'interrupted'}", file=sys.stderr)
                return 130
            finally:
                for kind, count in kinds.items():
                    if count > 3:
                        print(f"warning: {count - 3} more like this: {kind}...", file=sys.stderr)
    return run_command


class StopRequest:
    """Turns the first Ctrl-C into a flag, `asked`, so that a loop can stop between two steps.

    SIGTERM, SIGUSR1 (a scheduler's warning) and the terminal's end count as Ctrl-C. The second one
    raises KeyboardInterrupt. In a thread other than the main one no signal arrives, so the flag
    stays down.
    """

    SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")

    def __enter__(self):
        self.asked, self.handlers = False, {}
        if threading.current_thread() is threading.main_thread():
            for name in self.SIGNALS:
                number = getattr(signal, name, None)                    # Windows lacks some
                if number and signal.getsignal(number) != signal.SIG_IGN:    # SIGHUP under nohup
                    self.handlers[number] = signal.signal(number, self.handle)
        return self

    def handle(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- progress

def progress_bar(*args, leave: bool = True, **kwargs) -> tqdm:
    """A progress bar. Where standard error is no terminal, the lasting ones (leave=True) write a
    line a minute and the others nothing."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(*args, leave=leave, disable=not (terminal or leave),
                mininterval=0.5 if terminal else 60, **kwargs)


def duration(seconds: float) -> str:
    """A number of seconds in words: "5.6 minutes"."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
