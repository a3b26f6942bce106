"""What `dry_run=true` prints of memory, as numbers."""

import re

from tests.helpers.entry import Done


def memory(done: Done) -> dict[str, list[float]]:
    """The rows of the plan's table, GiB a rank at each moment."""
    _, _, below = done.out.partition("\nGiB per rank at each moment")
    lines = [line for line in below.splitlines()[2:] if ": " not in line]
    found = {}
    for line in lines:
        name, *cells = re.split(r"\s{2,}", line.strip())
        found[name] = [0.0 if cell == "-" else float(cell) for cell in cells]
    return found
