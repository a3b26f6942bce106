"""Makes transformers know longctx's checkpoints once it is imported; `import longctx` runs this.

Neither torch nor transformers is imported here, since most of longctx does without. A finder waits
for transformers' module of AutoConfig and registers stand-ins after it; the classes themselves are
made when a checkpoint of their type is read. Costs one string comparison per later import.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from longctx.models.export.model_types import MODEL_TYPE, OWN

AUTO = "transformers.models.auto.configuration_auto"


class _Finder(MetaPathFinder):
    """Finds only `AUTO`, as Python would."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module with a loader that registers; None for all others."""
        if fullname != AUTO:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """A module's own loader; registers when the module is there."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Runs the module and registers behind it."""
        self._loader.exec_module(module)
        sys.meta_path.remove(_FINDER)
        _register()


def _register() -> None:
    """Gives AutoConfig a stand-in for each type."""
    from transformers import AutoConfig

    for model_type in (MODEL_TYPE, *OWN):
        AutoConfig.register(model_type, _stand_in(model_type), exist_ok=True)


def _stand_in(model_type: str) -> Any:
    """A configuration class that reads with another one."""
    from transformers import PreTrainedConfig

    def from_dict(values: dict[str, Any], **named: Any) -> Any:
        from longctx.models.export.classes import config_class  # brings torch

        return config_class(values).from_dict(values, **named)

    own = {"model_type": model_type, "from_dict": staticmethod(from_dict), "__module__": __name__}
    return type("StandIn", (PreTrainedConfig,), own)


_FINDER = _Finder()
if AUTO in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _FINDER)
