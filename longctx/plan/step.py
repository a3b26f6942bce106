"""Activations of one micro-batch: the recipe's own loss and backward pass, run without values.

Each moment has its peak: the forward pass, the head and the loss, the backward pass of a decoder's
and of an encoder's layers, and of the embedding. Layers of a stack are alike, so three are run and
what one more would add is counted for the others. Costs about a second, whatever the length.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from longctx.batch import Batch
from longctx.config import RunConfig
from longctx.models.stand_ins import Shadow, backward, cast_shadow
from longctx.plan.live import Live
from longctx.recipe import Recipe

FORWARD, LOSS, BACKWARD, EMBEDDING = "forward", "loss", "backward", "embedding"
ENCODER, TEACHER, DECODER = "encoder", "teacher", "decoder"
INPUT, HEAD, WORK = "batch", "head and loss", "layer at hand"
FEW = 3  # layers of a stack that are run

Peaks = dict[str, dict[str, float]]


def micro_batch(run: RunConfig, recipe: Recipe, sp: int = 1) -> Batch:
    """A rank's part of a micro-batch of the run, on the meta device.

    All of its contexts: a rank encodes a part of them, and its cross-attention reads every state.
    """
    rows, length = run.train.micro_batch_rows, -(-run.data.seq_len // sp)
    row = torch.empty(rows, length, dtype=torch.int64, device="meta")
    named: dict[str, Tensor] = {}
    if run.contexts.count:
        named["contexts"] = row.new_empty(rows, run.contexts.count, run.contexts.size)
    if run.teacher.source == "stored" and recipe.distils:
        k = run.kl.top_k
        named["teacher_ids"] = row.new_empty(rows, length, k)
        named["teacher_probabilities"] = row.new_empty(rows, length, k + 1, dtype=torch.float16)
    return Batch(row, row.clone(), row.clone(), **named)


def activations(run: RunConfig, recipe: Recipe, model: Any, sp: int = 1) -> Peaks:
    """Bytes per rank at each moment's peak, by place; weights and their gradients are not in it.

    Args:
        run: the run.
        recipe: whose loss it is.
        model: its sketch, on the meta device; it can be used for nothing else afterwards.
        sp: ranks that share a row.

    Returns:
        `{moment: {place: bytes}}`.
    """
    cast_shadow(model)
    trained = recipe.trainable(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    stacks = [(stack, many) for stack, _ in _stacks(model) if (many := _alike(stack, model)) > FEW]
    for stack, _ in stacks:
        _cut(stack, FEW)
    whole = before = _once(run, recipe, model, sp)
    for stack, many in stacks:
        _cut(stack, FEW - 1)
        after = _once(run, recipe, model, sp)
        whole, before = _longer(whole, before, after, many - FEW), after
    return {moment: dict(places) for moment, places in whole.items()}


def _longer(whole: Peaks, more: Peaks, less: Peaks, times: int) -> Peaks:
    """`whole` and so many times what `more` has beyond `less`."""
    out: Peaks = {}
    for moment, places in whole.items():
        found = Counter(places)
        for place in {*more.get(moment, {}), *less.get(moment, {})}:
            one = more.get(moment, {}).get(place, 0) - less.get(moment, {}).get(place, 0)
            found[place] += times * one  # type: ignore[assignment]
        out[moment] = {place: float(size) for place, size in found.items() if size}
    return out


def _alike(stack: Any, model: Any) -> int:
    """How many layers of a stack keep something for the backward pass, all in the same way."""
    if hasattr(model, "cross_attending") and stack is not model.encoder:
        return len(model.cross_attending())  # gradients reach no lower
    return len(getattr(stack, "layers", ()))


def _cut(stack: Any, layers: int) -> None:
    """Leaves the top layers of a stack."""
    stack.layers = stack.layers[-layers:]
    stack.config.num_hidden_layers = layers


def _once(run: RunConfig, recipe: Recipe, model: Any, sp: int) -> Any:
    """Peaks of the model as it is."""
    live = Live([*model.parameters(), *model.buffers()])
    hooks = [h for part, place in _stacks(model) for h in _watch(part, place, live)]
    trained = [p for p in model.parameters() if p.requires_grad]
    hooks += [p.register_post_accumulate_grad_hook(_forget) for p in trained]
    live.place, live.moment = INPUT, FORWARD
    try:
        with live, Shadow():
            total, _ = recipe.loss(run, model, micro_batch(run, recipe, sp))
            backward(total)
    finally:
        for hook in hooks:
            hook.remove()
    return live.peaks


def _stacks(model: Any) -> list[tuple[Any, str]]:
    """Its encoder and decoder, as far as there are any."""
    encoder = getattr(model, "encoder", None)
    found = [(encoder, ENCODER)] if isinstance(encoder, nn.Module) else []
    if not found or hasattr(model, "cross_attending"):
        found.append((model.get_decoder(), DECODER))
    return found


def _watch(stack: Any, place: str, live: Live) -> list[Any]:
    """Hooks that say what is running, forward and backward."""

    def enter(*_: Any) -> None:
        live.place = place if torch.is_grad_enabled() else TEACHER

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        live.place, live.moment = HEAD, LOSS
        state = out.last_hidden_state
        if state.requires_grad:
            state.register_hook(lambda grad: reach(f"{place} {BACKWARD}"))

    def first(module: nn.Module, args: Any, named: Any) -> None:
        below = args[0] if args else named["hidden_states"]
        if below.requires_grad and torch.is_grad_enabled() and not live.moment.endswith(BACKWARD):
            below.register_hook(lambda grad: reach(f"{place} {EMBEDDING}"))

    def reach(moment: str) -> None:
        live.place, live.moment = WORK, moment

    hooks = [stack.register_forward_pre_hook(enter), stack.register_forward_hook(leave)]
    if len(getattr(stack, "layers", ())):
        hooks.append(stack.layers[0].register_forward_pre_hook(first, with_kwargs=True))
    return hooks


def _forget(parameter: Tensor) -> None:
    """A gradient is counted where it is kept, not here."""
    parameter.grad = None
