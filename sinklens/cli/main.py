"""`sinklens`: assembles the commands and turns errors into messages and exit codes."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from pathlib import Path

import typer
from typer.exceptions import TyperException

from sinklens.core.errors import SinklensError

from . import cite, compare, doctor, export, listing, mitigate, probe, profile, report, testbed
from .together import alone

app = typer.Typer(
    name="sinklens",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find attention sinks, massive activations and Super Experts in a transformer, and say how sure that is.",
)
for module in (profile, mitigate, report, compare, export, cite, doctor, listing):
    app.command(module.NAME, help=module.HELP, epilog=module.EXAMPLES)(module.command)
app.add_typer(probe.app, name="probe")
app.add_typer(testbed.app, name="testbed")


@app.callback(invoke_without_command=True)
def options(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    if version:
        from sinklens import __version__

        typer.echo(f"sinklens {__version__}")
        raise typer.Exit


def run() -> None:
    """Entry point. Users' mistakes end in a message and an exit code, never in a traceback."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: list[str]) -> int:
    """Run a command line and return its exit code."""
    verbose = "-vv" in arguments or "--traceback" in arguments
    arguments = [argument for argument in arguments if argument not in ("-vv", "--traceback")]
    try:
        alone(arguments)
        result = typer.main.get_command(app).main(arguments, prog_name="sinklens", standalone_mode=False)
        sys.stdout.flush()  # here, where a closed pipe or a full disk can still be told from a bug
        return int(result or 0)
    except typer.Exit as done:
        return done.exit_code
    except TyperException as error:
        show = getattr(error, "show", None)  # usage errors know their command's usage line
        show() if show is not None else say_error(str(error))
        return 2
    except (KeyboardInterrupt, typer.Abort):
        say_error("Stopped.")
        return 130
    except SinklensError as error:
        if verbose:
            traceback.print_exc()
        say_error(str(error))
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output has gone (| head); Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return _bug(error, arguments, verbose)
        say_error("The disk is full: the output could not be written.")
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (Python would try to flush the old one once more)
        return 4
    except Exception as error:
        return _bug(error, arguments, verbose)


def say_error(text: str) -> None:
    """A message on stderr, in red where that is wanted."""
    head, *rest = text.splitlines() or [""]
    coloured = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    print("\n".join([f"\033[31m{head}\033[0m" if coloured else head, *rest]), file=sys.stderr)


def _bug(error: Exception, arguments: list[str], verbose: bool) -> int:
    """An error nobody foresaw: say so, and leave what is needed to find it."""
    if verbose:
        traceback.print_exc()
    crash = Path("sinklens-crash.json")
    details = {"arguments": arguments, "error": repr(error), "traceback": traceback.format_exception(error)}
    message = f"This is a bug in sinklens: {type(error).__name__}: {error}"
    try:
        crash.write_text(json.dumps(details, indent=1), encoding="utf-8")
        say_error(f"{message}\nPlease report it with the file {crash}.")
    except OSError:
        say_error(f"{message}\nPlease report it with the output of the same command and -vv.")
    return 1
