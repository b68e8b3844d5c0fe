"""Whether two judgements of the same runs wrote the same tables, byte for byte. Answer: they do.

    python -m experiments.same_tables OLD NEW

``OLD`` and ``NEW`` are directories that ``python -m meta_train evaluate ... --out`` wrote, before and after a change of the
code that judges, on one processor, with one torch and with the compiled kernels built. A table that ``NEW`` lacks counts as
different. On 2026-12-01 the two engines for arenas and suites became one; the tables of ``quadratic``, of ``mnist``
(``mnist-modulated`` and ``default``) and of the suite ``judge`` to 200 steps did not change.
"""

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Compare every table of the old directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args()
    tables = sorted(options.old.glob("*.csv"))
    others = [options.new / one.name for one in tables]
    pairs = zip(tables, others, strict=True)
    different = [one.name for one, other in pairs if not other.exists() or one.read_bytes() != other.read_bytes()]
    print(
        f"{len(tables) - len(different)} of {len(tables)} tables are the same" + "".join(f"\n{name}" for name in different)
    )
    return 1 if different or not tables else 0


if __name__ == "__main__":
    sys.exit(main())
