"""Start-up and resume of the loader on a synthetic index of 10 million documents.

The store is real but for its tokens, which are a sparse file of zeros with right checksums. Each
measurement is a process of its own: from the opened imports to the first batch in hand.
"""

import json
import os
import statistics
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.data_claims import ratio  # noqa: E402

DOCUMENTS = 10_000_000
ROW = 8192
LATE = 1_000_000  # the step that is resumed at
KINDS = 2000  # different document lengths, so that their checksums are quickly made


def store(path: Path) -> Path:
    """A store of documents of 200 tokens to some 30,000, log-normal, one thousand in the median."""
    if path.exists():
        return path
    random = np.random.default_rng(0)
    kinds = np.clip(random.lognormal(np.log(1000), 1.2, KINDS), 200, 30_000).astype(np.int64)
    crc = np.array([zlib.crc32(bytes(2 * int(n))) for n in kinds], "<u4")
    kind = random.integers(0, KINDS, DOCUMENTS)
    ends = np.cumsum(kinds[kind])
    path.mkdir(parents=True)
    with (path / "tokens.ds").open("wb") as file:
        file.truncate(2 * int(ends[-1]))
    ends.astype("<u8").tofile(path / "tokens.ds.index")
    crc[kind].tofile(path / "tokens.ds.crc")
    meta = {
        "format": 1, "tokenizer_sha256": "0" * 64, "vocab_size": 4096, "bos_id": 1, "eos_id": 2,
        "dtype": "uint16", "documents": DOCUMENTS, "tokens": int(ends[-1]), "digest": "synthetic",
        "source": {},
    }  # fmt: skip
    (path / "meta.json").write_text(json.dumps(meta))
    return path


def start(path: Path, packing: str, step: int) -> None:
    """Opens the store and makes the batch of one step; prints seconds and memory."""
    import torch  # noqa: F401 - imported before the clock starts, as a trainer has

    from longctx.config import DataConfig
    from longctx.data.loader import packed
    from longctx.data.store import Store

    def resident() -> int:
        fields = Path("/proc/self/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    before, begin = resident(), time.perf_counter()
    data = DataConfig([str(path)], [], ROW, packing, mask_documents=True)
    loader = packed([Store(path)], data, batch_rows=64, micro_batch_rows=1, seed=0)
    loader.step(step, 0, 8)
    seconds = time.perf_counter() - begin
    memory = (resident() - before) / DOCUMENTS
    print(json.dumps({"seconds": seconds, "bytes_per_document": memory}))


def measure(out: Path, rounds: int) -> list[dict[str, Any]]:
    """Seconds to the first batch at step 0 and at step 1,000,000, for both packings."""
    path = store(out / "ten_million")
    claims = []
    for packing in ("concat", "best_fit"):
        found: dict[int, list[float]] = {0: [], LATE: []}
        memory = 0.0
        for _ in range(rounds):
            for step, seconds in found.items():
                command = [sys.executable, __file__, str(path), packing, str(step)]
                done = subprocess.run(
                    command, capture_output=True, text=True, check=True,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )  # fmt: skip
                facts = json.loads(done.stdout)
                seconds.append(facts["seconds"])
                memory = facts["bytes_per_document"]
        shares = [late / early for early, late in zip(found[0], found[LATE], strict=True)]
        name = f"10M documents, {packing}"
        facts = {
            "bytes_per_document": memory,
            "seconds_at_step_0": statistics.median(found[0]),
        }
        late = f"{name}: start at step {LATE:,}"
        claims.append(ratio(f"{late} over step 0", shares, "<=", 1.5, facts))
        claims.append(ratio(f"{late}, seconds", found[LATE], "<", 5, {}))
    return claims


def packing() -> list[dict[str, Any]]:
    """Padding of best fit on the lab corpus, and that no token is lost."""
    from longctx.data.corpus import Corpus
    from longctx.data.pack import best_fit, describe
    from longctx.data.store import Store

    names = ("text", "retrieval", "retrieval_long")
    lengths = Corpus([Store(ROOT / "data" / "lab" / name) for name in names]).lengths
    claims = []
    for row in (8192, 32768, 131072):
        found = describe(best_fit(lengths, row, 0), lengths, row)
        assert found["tokens_in"] == found["tokens_out"], "tokens were lost"
        facts = {name: found[name] for name in ("rows", "documents", "tokens_in", "cut")}
        claim = f"best fit, lab corpus, rows of {row:,}: padding, percent"
        claims.append(ratio(claim, [100 * found["padding"]], "<", 0.5, facts))
    return claims


if __name__ == "__main__":
    start(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
