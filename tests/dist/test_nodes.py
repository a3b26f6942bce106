"""Two nodes: two launchers, one rendezvous; the loss is that of one process.

On one machine, once as two launchers side by side and, where the rights allow, in two network
namespaces: each then has an address of its own and sees nothing of the other but the wire.
"""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.entry import run_entry
from tests.helpers.process import BIN, ROOT, kill_tree, lines
from tests.helpers.spawn import free_port
from tests.helpers.tiny import make_store, tiny_arguments

ADDRESSES = ("10.211.55.1", "10.211.55.2")


def losses(run_dir: Path) -> list[float]:
    found = [json.loads(x) for x in lines(run_dir / "metrics.jsonl")]
    return [x for m in found for x in (m["loss"], *([m["eval_loss"]] if "eval_loss" in m else []))]


def node(inside: list[str], arguments: list[str], log: Path, **variables: str) -> subprocess.Popen:
    """Starts launch/torchrun.sh on one node."""
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    own |= {"NODES": "2", "PROCESSES": "1", "PATH": f"{BIN}:{os.environ['PATH']}"} | variables
    with log.open("w") as out:
        return subprocess.Popen(
            [*inside, "bash", "launch/torchrun.sh", *arguments], cwd=ROOT, env=own, stdout=out,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


@contextlib.contextmanager
def two_networks() -> Iterator[list[str]]:
    """Two network namespaces joined by a cable; their names."""
    names = [f"longctx{i}-{os.getpid()}" for i in range(2)]
    ends = [f"lc{i}-{os.getpid() % 100_000}" for i in range(2)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            for device in (end, "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def places(kind: str, stack: contextlib.ExitStack) -> list[tuple[list[str], dict[str, str]]]:
    """For each node what stands before its command, and its variables."""
    if kind == "side by side":
        master = {"MASTER": f"127.0.0.1:{free_port()}", "ADDRESS": "127.0.0.1"}
        return [([], master), ([], master)]
    try:
        names = stack.enter_context(two_networks())
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    return [
        (["ip", "netns", "exec", name], {
            "MASTER": ADDRESSES[0], "ADDRESS": address, "GLOO_SOCKET_IFNAME": device,
        })
        for name, address, device in zip(names, ADDRESSES, _devices(names), strict=True)
    ]  # fmt: skip


def _devices(names: list[str]) -> list[str]:
    """The cable's end in each namespace."""
    listed = [
        json.loads(
            subprocess.check_output(["ip", "-j", "-n", name, "link", "show", "type", "veth"])
        )
        for name in names
    ]
    return [links[0]["ifname"] for links in listed]


@pytest.mark.dist
@pytest.mark.parametrize(
    "kind", ["side by side", pytest.param("two networks", marks=pytest.mark.slow)]
)
def test_two_nodes_train_as_one_process(kind, tmp_path):
    store = make_store(tmp_path / "store")
    more = ("train.max_steps=5", "train.eval_every=2", "parallel.zero_stage=2")
    alone = run_entry(tiny_arguments(store, tmp_path / "alone", *more), tmp_path / "alone-log")
    assert alone.code == 0, alone
    nodes: list[subprocess.Popen] = []
    with contextlib.ExitStack() as stack:
        for i, (inside, variables) in enumerate(places(kind, stack)):
            arguments = tiny_arguments(store, tmp_path / "two", *more)
            nodes.append(node(inside, arguments, tmp_path / f"{i}", **variables))
            stack.callback(kill_tree, nodes[-1])
        codes = [process.wait(240) for process in nodes]
    assert codes == [0, 0], "\n".join((tmp_path / f"{i}").read_text()[-3000:] for i in range(2))
    assert "x 2 ranks x" in (tmp_path / "0").read_text() + (tmp_path / "1").read_text()
    both, one = losses(tmp_path / "two"), losses(tmp_path / "alone")
    assert len(one) == 5 + 3
    assert both == pytest.approx(one, rel=1e-6)
