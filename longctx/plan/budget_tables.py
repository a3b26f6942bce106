"""A budget in words: a table of parts and moments, the time, what is assumed, the verdict."""

from longctx.plan.budget import Budget
from longctx.plan.machine import GIB
from longctx.plan.search import Change, typed


def table(budget: Budget) -> list[str]:
    """GiB by part (rows) and moment (columns); the largest column is marked."""
    moments = [m for m, parts in budget.moments.items() if sum(parts.values())]
    parts = list(dict.fromkeys(part for m in moments for part in budget.moments[m]))
    names = [f"{m} *" if m == budget.moment else m for m in moments]
    wide = max(len(p) for p in [*parts, "sum"])
    head = " " * wide + "  " + "  ".join(f"{name:>10}" for name in names)
    lines = ["GiB per rank at each moment's peak (* the run's peak)", head]
    for part in [*parts, "sum"]:
        cells = []
        for m, name in zip(moments, names, strict=True):
            held = budget.moments[m]
            size = sum(held.values()) if part == "sum" else held.get(part, 0.0)
            cells.append(f"{size / GIB:>{max(10, len(name))}.2f}" if size else
                         f"{'-':>{max(10, len(name))}}")  # fmt: skip
        lines.append(f"{part:<{wide}}  " + "  ".join(cells))
    if budget.host:
        each = ", ".join(f"{part} {size / GIB:.2f}" for part, size in budget.host.items())
        lines.append(f"in CPU memory, GiB per rank: {each}")
    return lines


def time_lines(budget: Budget) -> list[str]:
    """Seconds of a step by part, with what they are made of."""
    time, lines = budget.time, []
    for part, seconds in time.seconds.items():
        amount = (
            f"{time.flops[part] / 1e12:,.1f} TFLOP"
            if part in time.flops
            else f"{time.sent[part] / 1e9:,.2f} GB"
        )
        lines.append(f"  {part}: {amount}, {seconds:,.3g} s")
    tokens = budget.run.train.batch_rows * budget.run.row_tokens
    lines.append(
        f"  sum: {time.total:,.3g} s a step, {tokens / time.total:,.0f} tokens a second; "
        f"{budget.run.train.max_steps:,} steps in "
        f"{time.total * budget.run.train.max_steps / 3600:,.3g} h"
    )
    return ["time per step and rank, nothing overlapped:", *lines]


def assumptions(budget: Budget) -> str:
    """The machine, in the words that change it."""
    m = budget.machine
    return (
        f"assumed: gpus={m.gpus} gpu_memory={m.gpu_memory:g} host_memory={m.host_memory:g} "
        f"reserve={m.reserve:g} (GiB) peak={m.peak:g} (TFLOP/s) fraction={m.fraction:g} "
        f"gpus_per_node={m.gpus_per_node} link={m.link:g} network={m.network:g} "
        f"host_link={m.host_link:g} (GB/s)"
    )


def verdict(budget: Budget, change: list[Change] | None) -> list[str]:
    """Whether it fits, by how much, and what would make it fit."""
    m = budget.machine
    need = f"{budget.peak / GIB + m.reserve:.1f} of {m.gpu_memory:g} GiB at {budget.moment}"
    if budget.fits:
        return [f"FITS: {need}, {budget.margin:.1f} GiB to spare"]
    short = f"{-budget.margin:.1f} GiB too much"
    if budget.margin >= 0:
        need = f"{m.host_memory - budget.host_margin:.1f} of {m.host_memory:g} GiB of CPU memory"
        short = f"{-budget.host_margin:.1f} GiB too much"
    lines = [f"DOES NOT FIT: {need}, {short}"]
    if change is None:
        return [*lines, "no change of parallel.*, micro-batch or number of GPUs makes it fit"]
    return [*lines, f"smallest change that makes it fit: {typed(change)}"]
