#!/usr/bin/env python3
"""From the logs of training runs to a submission, and pictures of what happened.

    python records/records.py read logs/*.txt         what each run gave, and the rules' verdicts
    python records/records.py compare NEW… -- OLD…    is the difference real?
    python records/records.py COMMAND --help          one screen about each command
"""

import argparse
import importlib
import os
import sys

# Each command is a module with add_arguments(parser), run(args) -> exit code and, where argparse
# cannot read its form, rewrite(argv) -> argv. Imported when asked for: some need matplotlib.
COMMANDS = {
    "read": ("read", "a table of runs: speed, scores, bytes, time, a verdict per rule"),
    "compare": ("compare", "two groups of runs: difference, significance, settings, figure"),
    "plot": ("plot", "a run's training in one figure"),
    "watch": ("watch", "show a running run on the terminal until it ends"),
    "report": ("report", "a page to send: one HTML file with curves, tables and samples"),
    "script": ("script", "make the submission form of train_gpt.py"),
    "pack": ("pack", "make a submission folder from seed logs"),
    "check": ("check", "judge a submission folder rule by rule"),
    "inspect": ("inspect_artifact", "look into a packed artifact"),
    "sample": ("sample", "show what a packed model writes"),
    "export": ("export", "write a packed model as safetensors"),
}


def main(argv: list[str]) -> int:
    """Run one command; a user's mistake ends in one line and exit code 2."""
    commands = "\n".join(f"  {name:9} {meaning}" for name, (_, meaning) in COMMANDS.items())
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__.strip()}\n\nCommands:\n{commands}")
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"error: unknown command {argv[0]!r}; one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    name, meaning = COMMANDS[argv[0]]
    command = importlib.import_module(name)
    parser = argparse.ArgumentParser(
        prog=f"records.py {argv[0]}", description=command.__doc__ or meaning,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_arguments(parser)
    arguments = getattr(command, "rewrite", list)(argv[1:])
    try:
        return command.run(parser.parse_args(arguments))
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def on_terminal(argv: list[str]) -> int:
    """Run a command as a shell starts it: any encoding will do, and a reader may leave early."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = main(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head`: what is left has no reader, nor has Python's last flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(on_terminal(sys.argv[1:]))
