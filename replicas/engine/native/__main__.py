"""`python -m replicas.engine.native`: build the kernels now rather than at first use; exit status 1 if that fails."""

from __future__ import annotations

import argparse
import sys

from replicas.engine.native import library, why_not


def main() -> int:
    argparse.ArgumentParser(prog="python -m replicas.engine.native", description=__doc__).parse_args()
    kernels = library()
    if kernels is None:
        print(f"not built: {why_not()}; the engine runs on torch", file=sys.stderr)
        return 1
    print(kernels.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
