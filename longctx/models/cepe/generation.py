"""Transformers' `generate` for a model that reads contexts: they are encoded once, then handed on.

Costs one reading of the contexts; a beam or sample takes a copy of its row's states.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from longctx.errors import UserError
from longctx.models.cepe.encoded_contexts import Contexts


class ContextGeneration(GenerationMixin):
    """Mixed into a model whose `forward` takes `contexts` and whose `read` encodes them."""

    read: Any

    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        context_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        contexts: Contexts | None = None,
        **settings: Any,
    ) -> Any:
        """Transformers' `generate`, with contexts that are encoded once.

        Args:
            inputs: `[b s]`, the prompt; also as `input_ids`.
            context_ids: `[b c l]`.
            context_mask: `[b c l]`, True on real tokens.
            contexts: instead of both, encoded already.
            **settings: of transformers' `generate`.

        Raises:
            UserError: if the contexts do not fit, or there is no prompt.
        """
        if inputs is None:
            inputs = settings.pop("input_ids", None)
        if context_ids is not None or contexts is not None:
            if inputs is None:
                raise UserError("generate with contexts needs the tokens of a prompt: input_ids")
            with torch.no_grad():
                contexts = self.read(inputs, context_ids, context_mask, contexts)
        return super().generate(inputs, contexts=contexts, **settings)  # type: ignore[misc]

    def _expand_inputs_for_generation(  # type: ignore[override]
        self, expand_size: int = 1, **named: Any
    ) -> Any:
        """Beams and samples read the contexts of the row that they come from."""
        if expand_size > 1 and named.get("contexts") is not None:
            named["contexts"] = named["contexts"].repeated(expand_size)
        expand: Any = super()._expand_inputs_for_generation  # type: ignore[misc]
        return expand(expand_size=expand_size, **named)
