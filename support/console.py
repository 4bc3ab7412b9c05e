"""Output and exit of commands: errors of the user, standard streams, progress bars, Ctrl-C.

torch is not imported, so that a command that does not need it starts quickly.
"""
import contextlib
import functools
import os
import signal
import sys
import textwrap
import threading
import warnings
from collections import Counter
from collections.abc import Callable

from tqdm import tqdm


class InputError(ValueError):
    """A mistake in the user's input. The message is one line: what is wrong, where, what to do."""


# ---------------------------------------------------------------- standard streams

class TolerantStream:
    """A text stream that ignores write errors, so that a broken stream does not end a training.

    Writing to a full disk, a closed terminal or a closed pipe does nothing. Characters that the
    encoding lacks are written as escape sequences. If the stream is not a terminal, the carriage
    returns of a progress bar become line feeds. A missing stream (None, as under pythonw) is
    replaced by the null device.
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
        except (OSError, ValueError):                                # disk full, or closed
            return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def final_flush(self) -> None:
        """Flush for the last time. If that fails, redirect the stream's file to the null device,
        because Python's own flush at exit would fail as well."""
        try:
            self.stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextlib.contextmanager
def tolerant_streams():
    """Replace standard output and error by `TolerantStream`s; restore them at the end."""
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
    """A file name as printable text: bytes that are not UTF-8 become escape sequences."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# ---------------------------------------------------------------- the end of a command

OUT_OF_MEMORY = ("error: the GPU's memory is full ({}); less is taken by a smaller --batch "
                 "(predict.py), a smaller --eval-batch (evaluate.py, train.py) or --recompute "
                 "(train.py; a smaller --batch there needs another --name)")


def warning_kind(message: str) -> str:
    """The beginning of what a warning says after the name of its file."""
    return message.split(": ")[-1][:12]


def exit_status(command: Callable[..., int | None]) -> Callable[..., int]:
    """Decorate a command so that it returns its exit status.

    The status is the command's return value (0 if it returns nothing), 2 for a user's mistake or a
    full GPU memory, which are reported in one line, or 130 for Ctrl-C. The first three warnings of
    each kind are shown; the number of the others follows at the end.
    """
    @functools.wraps(command)
    def run_command(*args) -> int:
        kinds: Counter = Counter()
        last: dict[str, str] = {}

        def show_warning(message, *_, **__) -> None:
            kind = warning_kind(str(message))
            kinds[kind] += 1
            last[kind] = str(message).split(": ")[-1]
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
                if type(error).__name__ != "OutOfMemoryError":           # torch's class
                    raise
                print(OUT_OF_MEMORY.format(str(error).split(". ")[0]), file=sys.stderr)
                return 2
            except KeyboardInterrupt as interrupt:
                print(f"\n{str(interrupt) or 'interrupted'}", file=sys.stderr)
                return 130
            finally:
                for kind, count in kinds.items():
                    if count > 3:
                        words = textwrap.shorten(last[kind], 60, placeholder=" ...")
                        print(f"warning: {count - 3} more like this: {words}", file=sys.stderr)
    return run_command


class StopRequest:
    """Turns the first Ctrl-C into a flag, `asked`, so that a loop can stop between two steps.

    SIGTERM, SIGUSR1 (a scheduler's warning) and SIGHUP (the terminal was closed) count as Ctrl-C.
    The second signal raises KeyboardInterrupt. Only the main thread can handle signals; in another
    thread the flag stays false.
    """

    SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")

    def __enter__(self):
        self.asked, self.handlers = False, {}
        if threading.current_thread() is threading.main_thread():
            for name in self.SIGNALS:
                number = getattr(signal, name, None)                    # Windows lacks some
                under_nohup = (name == "SIGHUP" and number
                               and signal.getsignal(number) == signal.SIG_IGN)
                if number and not under_nohup:
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

def progress_bar(*args, leave: bool = True, kind: type[tqdm] | None = None, **kwargs) -> tqdm:
    """A progress bar, of class `kind` if that is given.

    If standard error is not a terminal, a bar with leave=True writes a line per minute, and one with
    leave=False writes nothing.
    """
    terminal = sys.stderr is not None and sys.stderr.isatty()
    return (kind or tqdm)(*args, leave=leave, disable=not (terminal or leave),
                          mininterval=0.5 if terminal else 60, **kwargs)


class StepBar(tqdm):
    """The progress bar of a training. After the first ten steps it prints once how long the others
    will take. work: the cost of all its steps, if one of the first ten costs 1; None: all cost 1.
    """
    announced = False
    work: float | None = None

    def advance(self) -> None:
        self.update()
        if not self.announced and self.n == self.initial + 10 < self.total:
            self.announced = True
            work = self.work or self.total - self.initial
            seconds = self.format_dict["elapsed"] / 10 * (work - 10)
            self.write(f"  about {duration(seconds)} for the remaining {self.total - self.n} "
                       f"steps, judged by the first ten")


def duration(seconds: float) -> str:
    """A duration in words, such as "5.6 minutes"."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
