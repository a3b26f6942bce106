"""Every rope scaling that is found in `conf/rope`, at the numbers of its example.

An example is `tests/examples/rope/NAME.yaml`: `numbers` of the scaling, and the `inv_freq` and
`attention_factor` that its formula gives at `length` (None: within the window).
"""

from typing import Any

import yaml

from longctx.config.rope import RopeConfig
from tests.helpers.process import ROOT

EXAMPLES = ROOT / "tests" / "examples" / "rope"
NAMES = sorted(path.stem for path in (ROOT / "conf" / "rope").glob("*.yaml"))
BASE, WINDOW, DIM = 1e4, 512, 8


def example(name: str) -> dict[str, Any]:
    """What the example of a scaling says; fails if there is none."""
    path = EXAMPLES / f"{name}.yaml"
    assert path.is_file(), f"rope {name!r} has no example tests/examples/rope/{name}.yaml"
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def rope_of(name: str, **other: Any) -> RopeConfig:
    """The scaling of an example, with some numbers replaced."""
    return RopeConfig(name, **(example(name)["numbers"] | other))
