"""What the scripts share: options, errors of one line, files that survive a crash."""

import argparse
import dataclasses
import difflib
import errno
import importlib
import inspect
import os
import re
import select
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NoReturn


def run_script(main: Callable[[list[str]], None]) -> NoReturn:
    """Run `main(argv)` and exit. Bad input (ValueError, OSError) is one line on stderr, code 2; so
    is too little memory, also in the words of torch."""
    for stream in (sys.stdout, sys.stderr):
        # Text that the terminal cannot show must not end a run. A log shows each line at once.
        stream.reconfigure(errors="replace", line_buffering=True)
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough, as head does
        # Python flushes once more at its end, and must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError, MemoryError, OverflowError, RuntimeError) as error:
        memory = not isinstance(error, (ValueError, OSError))
        words = "ried to allocate|size calculation overflowed"  # torch's, of memory
        if isinstance(error, RuntimeError) and not re.search(words, str(error)):
            raise
        named = isinstance(error, OSError) and error.filename
        message = f"{error.filename}: {error.strerror}" if named else f"{error}{origin(error)}"
        message = f"too little memory, ask for less. {message}" if memory else message
        one_line = " ".join(message.split())  # other libraries' messages may span lines
        # A single write, because the processes of torchrun write to one terminal.
        sys.stderr.write(f"{os.path.basename(sys.argv[0])}: error: {one_line}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def origin(error: Exception) -> str:
    """Where an error comes from that this project does not raise itself, as in a changed model:
    " (FILE:LINE)". For an OSError ""."""
    if isinstance(error, OSError):
        return ""
    root, frames = Path(__file__).parent.parent, traceback.extract_tb(error.__traceback__)
    folders = [(root / name).resolve() for name in ("", "data", "tests")]
    # A script's name is as it was given, maybe a link. "<string>" is no file.
    files = [(f, Path(f.filename).resolve()) for f in frames if os.path.isabs(f.filename)]
    last, path = [(frame, path) for frame, path in files if path.parent in folders][-1]
    if last is frames[-1] and last.line.startswith("raise"):
        return ""
    return f" ({os.path.relpath(path, folders[0])}:{last.lineno})"


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """A context that adds `path` to an error of the system that names no file: errors of opening
    a file name it, those of reading and writing do not. `run_script` prints the name."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = path
        raise


def new_parser(name: str, doc: str, **more) -> argparse.ArgumentParser:
    """The parser of the script `name`. --help shows `doc` as it is written."""
    layout = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(name, description=doc, formatter_class=layout, **more)


# Options of nanoGPT, which many readers know, and what they are here: "" if there is none.
NANOGPT = {
    "train.py": {
        "--batch_size": "--micro_batch", "--gradient_accumulation_steps": "--batch_tokens",
        "--learning_rate": "--lr", "--max_iters": "--steps", "--eval_interval": "--eval_every",
        "--init_from": "--resume", "--dropout": "", "--dtype": "", "--min_lr": "", "--bias": "",
        "--backend": "", "--eval_only": "",
    },
    "sample.py": {"--start": "--prompt", "--out_dir": "--checkpoint"},
}


def parse_args(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse `argv`. Anything wrong with it is a ValueError of one line, which names the nearest
    known option, also for one of nanoGPT's. Options have to be written whole, so that a new one
    never makes an old command ambiguous."""

    def fail(message: str) -> NoReturn:
        if message.startswith("unrecognized"):
            message += ": put a value after its option (a switch takes none), see --help"
        if "ignored explicit argument" in message:
            message += ": a switch takes no value, see --help"
        raise ValueError(message)

    parser.error = fail  # argparse's own prints the usage and exits
    options = [name for action in parser._actions for name in action.option_strings]
    # This comes first: argparse would rather complain about the word after an unknown option.
    for word in argv[: argv.index("--")] if "--" in argv else argv:
        option = word.split("=")[0]
        if re.fullmatch(r"--?[a-zA-Z]\S*", option) and option not in options:
            hint = "" if option.startswith("--") else " (a value needs =, as in --option=-VALUE)"
            meant = NANOGPT.get(parser.prog, {}).get(option, option)
            guess = nearest(meant, options, "none is like it, see --help")
            raise ValueError(f"unknown option {option}: {guess}{hint}")
    args = parser.parse_intermixed_args(argv)
    for name, value in vars(args).items():
        if value == "" and name not in ("prompt", "field"):
            raise ValueError(f"--{name} is empty: give it a value, or leave it out")
        if str(value).startswith("~/") and name != "prompt":
            raise ValueError(f"--{name} {value}: your shell left the ~: put a space before, not =")
        # Python marks bytes that are not UTF-8 so. torch cannot read a file of such a name, and a
        # tokenizer would change such a prompt.
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            raise ValueError(f"--{name} {value} is not UTF-8 text: convert or rename it")
    return args


def nearest(word: str, choices: Iterable[str], otherwise: str) -> str:
    """The hint that ends an error message about the unknown `word`."""
    matches = difflib.get_close_matches(word, choices, n=1)
    return f"did you mean {matches[0]}?" if matches else otherwise


def add_fields(
    prog: str, doc: str, configs: dict[str, dict], default: str, classes: Iterable[type]
) -> argparse.ArgumentParser:
    """A parser with the name of one of `configs` (each: field -> value), and every field of these
    dataclasses as an option without a default. The comment beside a field is its help."""
    usage = f"{prog} [config] [--option value ...]"
    parser = new_parser(prog, doc, usage=usage, argument_default=argparse.SUPPRESS)
    parser.add_argument(
        "config", nargs="?", default=default, choices=configs, metavar="config",
        help=f"one of {', '.join(configs)} (default: {default})",
    )
    for cls in classes:
        group = parser.add_argument_group(cls.__name__)
        source = "".join(inspect.getsource(base) for base in cls.__mro__ if base is not object)
        comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
        for field in dataclasses.fields(cls):
            how = {"type": field.type, "metavar": field.type.__name__}
            if field.type is bool:
                how = {"action": argparse.BooleanOptionalAction}
            text = comments[field.name]
            if field.default != "":
                n_own = sum(field.name in fields for fields in configs.values())
                shown = [str(field.default)] if n_own < len(configs) else []
                shown += ["the config's own"] if n_own else []
                text += f" (default: {', or '.join(shown)})"
            group.add_argument(f"--{field.name}", help=text.replace("%", "%%"), **how)
    return parser


def import_optional(module: str, what: str, extra: str) -> ModuleType:
    """Import a module that `what` needs; returns its package, as `import` does. Raises ValueError
    if that is not installed, which comes with `extra` of pyproject.toml."""
    package = module.split(".")[0]
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{what} needs the package {package}: pip install '.[{extra}]'") from error
    return sys.modules[package]


def sync(path: str | os.PathLike) -> None:
    """Bring a file to the disk."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def sync_names(folder: str | os.PathLike) -> None:
    """Bring the names of the files in a folder to the disk, where the system can do that."""
    if os.name != "posix":
        return
    entries = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(entries)
    except OSError as error:
        if error.errno != errno.EINVAL:  # so some network disks answer for every folder
            raise
    finally:
        os.close(entries)


@contextmanager
def handling(receive: Callable, *names: str) -> Iterator[None]:
    """A context in which `receive(number, frame)` gets the signals of these names, such as SIGHUP.
    A signal that is ignored stays ignored, because nohup ignores SIGHUP on purpose."""
    before = {}
    for name in names:
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, receive)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def drop_unread_output() -> None:
    """From now on drop output that nobody can read, because its terminal is closed or tee has
    ended. To print there is an error, which must not end a run that has something to save."""
    if not hasattr(select, "poll"):  # Windows
        return
    for number in (1, 2):  # stdout and stderr
        poll = select.poll()
        poll.register(number, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


def is_taken(path: str | os.PathLike) -> bool:
    """Whether there is something at `path`, other than an empty folder."""
    return os.path.exists(path) and not (os.path.isdir(path) and not os.listdir(path))


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A context with an empty folder to fill. At the end it is brought to the disk and gets the
    name `path`. After an error, Ctrl-C, a kill or a closed terminal nothing is left of it, nor of
    what was put beside it. Raises FileExistsError if `path` is taken by then."""
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        handling(lambda number, _: sys.exit(128 + number), "SIGTERM", "SIGHUP"),
        tempfile.TemporaryDirectory(prefix=f"{target.name}.tmp-", dir=target.parent) as around,
    ):
        folder = Path(around, "new")
        folder.mkdir()  # others may read it, unlike the folder around it
        yield folder
        for file in folder.iterdir():
            sync(file)  # the folder must not appear before its content is on the disk
        sync_names(folder)
        try:
            os.rename(folder, target)
        except OSError as error:
            if not is_taken(target):
                raise
            raise FileExistsError(f"{path} appeared meanwhile: choose another folder") from error
        sync_names(target.parent)
