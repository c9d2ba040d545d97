"""``restore-kernels`` and ``python -m restore_kernels``: what is installed here, and ``profile``."""

from __future__ import annotations

import difflib
import sys

from restore_kernels.info import info

USAGE = """usage: restore-kernels            versions, build, backends and why-nots
       restore-kernels profile    time the operators on this machine (--help says how)"""


def main() -> None:
    command, *arguments = sys.argv[1:] or [""]
    if command == "":
        show_info()
    elif command == "profile":
        from restore_kernels.profiling import cli

        sys.exit(cli.run(arguments))
    elif command in ("-h", "--help"):
        print(USAGE)
    else:
        close = difflib.get_close_matches(command, ["profile", "--help"], n=1, cutoff=0)[0]
        print(f"restore-kernels: there is no {command!r}; nearest is {close!r}", file=sys.stderr)
        sys.exit(2)


def show_info() -> None:
    for name, value in info().items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, entry in value.items():
                print(f"  {key}: {entry}")
        else:
            print(f"{name}: {value}")


if __name__ == "__main__":
    main()
