"""How much ``import learned_optim`` adds to ``import torch``.

python -m benchmarks.import_time
"""

import subprocess
import sys

from benchmarks.timing import side_by_side, write_table


def importing(module: str) -> None:
    """Import a module in a process of its own."""
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)


def main() -> None:
    """Time both imports, taking turns."""
    seconds = side_by_side({m: lambda m=m: importing(m) for m in ("torch", "learned_optim")}, repeats=9)
    ratio = seconds["learned_optim"] / seconds["torch"]
    print(f"importing learned_optim takes {ratio:.3f} x the time of importing torch alone")
    write_table("import_time", [{"ratio_to_torch": round(ratio, 3)}])


if __name__ == "__main__":
    main()
