"""Run fake passes: `python -m nogpu GUARD PASS-OR-MUTANT ...`; prints one JSON row a part.

GUARD: the library of fakecuda.build, or "" where this torch needs none.
"""

import sys

from nogpu import fakecuda


def main(library, *names):
    if library:
        fakecuda.load(library)  # before torch
    from nogpu import fake_pass
    fake_pass.main(names)


if __name__ == "__main__":
    main(*sys.argv[1:])
