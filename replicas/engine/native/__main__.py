"""`python -m replicas.engine.native`: build the kernels now rather than at first use.

Without a compiler the engine runs on torch, so that is no error here; with --require it is (exit status 1).
"""

from __future__ import annotations

import argparse
import sys

from replicas.engine.native import library, why_not


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m replicas.engine.native",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--require", action="store_true", help="fail if the kernels cannot be built")
    args = parser.parse_args()
    kernels = library()
    if kernels is None:
        print(f"not built: {why_not()}; the engine runs on torch", file=sys.stderr)
        return int(args.require)
    print(kernels.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
