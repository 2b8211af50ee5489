"""The command line of the scripts prepare.py, train.py and sample.py: options, and errors of one line."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


def run_script(main: Callable[[list[str]], None]) -> NoReturn:
    """Run `main(argv)` and exit: bad input (ValueError, OSError) is one line on stderr and exit code 2."""
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        sys.exit(141)
    except (ValueError, OSError) as error:
        named = isinstance(error, OSError) and error.filename
        message = f"{error.filename}: {error.strerror}" if named else str(error)
        one_line = " ".join(message.split())  # other libraries' messages may span lines
        print(f"{os.path.basename(sys.argv[0])}: error: {one_line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def parse_args(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse `argv`; anything wrong with it is a one-line ValueError, which names the nearest known option."""

    def fail(message: str) -> NoReturn:
        raise ValueError(message)

    parser.error = fail  # argparse's own prints the usage and exits
    options = [name for action in parser._actions for name in action.option_strings]
    # looked for first: argparse would rather complain about the word after an unknown option
    for word in argv[: argv.index("--")] if "--" in argv else argv:
        option = word.split("=")[0]
        if re.fullmatch(r"--?[a-zA-Z]\S*", option) and option not in options:
            raise ValueError(f"unknown option {option}: {nearest(option, options, 'see --help')}")
    return parser.parse_intermixed_args(argv)


def nearest(word: str, choices: Iterable[str], otherwise: str) -> str:
    """The hint that ends an error message about the unknown `word`."""
    matches = difflib.get_close_matches(word, choices, n=1)
    return f"did you mean {matches[0]}?" if matches else otherwise
