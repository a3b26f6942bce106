"""Claims about data preparation and the loader, measured on real texts; docs/data.md has the table.

    python benchmarks/data.py corpus            texts of the lab and Python sources of this machine
    python benchmarks/data.py filter [--write]  filter + tokenise over the bare tokenizer; 2 workers
    python benchmarks/data.py memory [--write]  peak with one document of four million tokens
    python benchmarks/data.py loader [--write]  tokens/s over what the lab trainer takes in
    python benchmarks/data.py index  [--write]  10 million documents: start and resume
    python benchmarks/data.py packing [--write] padding of best fit on the lab corpus

Ratios are of neighbours in time: the two sides take turns, `--rounds` times. --write keeps the
JSON under benchmarks/results; `python lab/pages/results.py data` then writes the page.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.data_claims import keep, ratio  # noqa: E402

OUT = ROOT / "outputs" / "benchmark_data"
RAW = OUT / "raw"
LAB = ROOT / "assets" / "lab-llama"
CHARACTERS = 1 << 20  # texts that the bare tokenizer gets at a time
LEAST = 2_000  # characters of a code document
CODE = 90_000_000  # characters of code in all


def corpus() -> None:
    """RedPajama-shaped JSONL: data/lab/raw, and a document for each package of Python sources."""
    shutil.rmtree(OUT, ignore_errors=True)
    for file in sorted((ROOT / "data/lab/raw").rglob("*.jsonl")):
        if file.parent.name != "github":
            target = RAW / file.parent.name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    (RAW / "github").mkdir(parents=True)
    total = 0
    with (RAW / "github" / "python.jsonl").open("w", encoding="utf-8") as out:
        for name, text in _packages():
            out.write(json.dumps({"text": text, "meta": {"repo_name": name}}) + "\n")
            total += len(text)
            if total >= CODE:
                break
    print(f"{RAW}: {total:,} characters of Python and the lab's texts")


def _packages() -> Iterator[tuple[str, str]]:
    """(dotted name, sources joined), a document for each package with enough code of its own."""
    import torch

    site = Path(torch.__file__).parent.parent
    for folder in sorted({p.parent for p in site.rglob("*.py")}):
        parts = []
        for file in sorted(folder.glob("*.py")):
            try:
                parts.append(file.read_text("utf-8"))
            except UnicodeDecodeError:
                continue
        text = "\n".join(parts)
        if len(text) >= LEAST:
            yield ".".join(folder.relative_to(site).parts), text


# --- filter + tokenise ----------------------------------------------------------------------------


def tokenizers() -> dict[str, Path]:
    """The lab's tokenizer as each library reads it."""
    fast = OUT / "fast"
    fast.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(LAB / name, fast / name)
    return {"sentencepiece": LAB, "tokenizers": fast}


def bare(tokenizer: Path) -> dict[str, float]:
    """Seconds of the library's own batch encoding, nothing else, of the same texts in memory."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    texts = []
    for file in sorted(RAW.rglob("*.jsonl")):
        with file.open("rb") as lines:
            texts += [json.loads(line)["text"] for line in lines]
    if (tokenizer / "tokenizer.model").is_file():
        import sentencepiece as spm

        model = spm.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))

        def encode(batch: list[str]) -> int:
            return sum(map(len, model.encode(batch, num_threads=1)))
    else:
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        fast.encode_special_tokens = True

        def encode(batch: list[str]) -> int:
            return sum(len(e.ids) for e in fast.encode_batch(batch, add_special_tokens=False))

    seconds, tokens, batch, size = 0.0, 0, [], 0
    for text in [*texts, None]:
        if text is None or size >= CHARACTERS:
            begin = time.perf_counter()
            tokens += encode(batch)
            seconds += time.perf_counter() - begin
            batch, size = [], 0
        if text is not None:
            batch.append(text)
            size += len(text)
    return {"seconds": seconds, "tokens": float(tokens)}


def pipeline(tokenizer: Path, workers: int) -> dict[str, float]:
    """Seconds of the filter from the first worker's start to the published stores."""
    from longctx import cli
    from longctx.data_prep import executors
    from longctx.data_prep.filter_redpajama import plan
    from longctx.data_prep.settings import FilterConfig

    output = OUT / "filtered"
    for leftover in (output, output.with_name("filtered.work")):
        shutil.rmtree(leftover, ignore_errors=True)
    arguments = [f"input='{RAW}'", f"output='{output}'", f"tokenizer='{tokenizer}'"]
    arguments += ["min_tokens=4096", f"workers={workers}", "split_mib=16"]
    arguments += [f"evaluation_files=['{file}']" for file in held_out()]
    job = plan(
        cli.compose(
            arguments, FilterConfig, "filter_redpajama", "filter_schema", cli.CONF / "data_prep"
        )
    )
    begin = time.perf_counter()
    executors.run("local", job)
    seconds = time.perf_counter() - begin
    summary = json.loads((output / "summary.json").read_text())["total"]
    return {
        "seconds": seconds,
        "tokens": summary["tokens"]["in"],
        "documents": summary["documents"]["in"],
        "kept_tokens": summary["tokens"]["kept"],
        "kept_documents": summary["documents"]["kept"],
    }


def held_out() -> list[Path]:
    """The lab's held-out texts in one file, which the filter looks for in every document."""
    file = OUT / "evaluation.jsonl"
    parts = sorted((ROOT / "data/lab/raw_held_out").rglob("*.jsonl"))
    file.write_bytes(b"".join(part.read_bytes() for part in parts))
    return [file]


def apart(part: str, tokenizer: Path, workers: int, cores: int) -> dict[str, Any]:
    """One measurement in a process of its own on so many cores."""
    command = [sys.executable, __file__, part, "--tokenizer", str(tokenizer)]
    command += ["--workers", str(workers)]
    allowed = set(sorted(os.sched_getaffinity(0))[:cores])
    done = subprocess.run(
        command, capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, allowed),
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure_filter(rounds: int) -> list[dict[str, Any]]:
    """Throughput over the bare tokenizer, for both libraries, and with two workers over one."""
    found = []
    for name, tokenizer in tokenizers().items():
        shares, gains, last = [], [], {}
        for _ in range(rounds):
            alone = apart("_bare", tokenizer, 1, 1)
            one = apart("_pipeline", tokenizer, 1, 1)
            two = apart("_pipeline", tokenizer, 2, 2)
            shares.append((one["tokens"] / one["seconds"]) / (alone["tokens"] / alone["seconds"]))
            gains.append(one["seconds"] / two["seconds"])
            last = one | {"bare_tokens_per_second": alone["tokens"] / alone["seconds"]}
            print(f"{name}: {shares[-1]:.3f} of the bare one, two workers {gains[-1]:.2f}x")
        claim = f"filter + tokenise over bare {name}, one core"
        found.append(ratio(claim, shares, ">=", 0.9, last))
        found.append(ratio(f"two workers over one, {name}", gains, ">=", 1.7, {}))
    return found


def measure_memory() -> list[dict[str, Any]]:
    """Peak resident memory of the filter's largest process."""
    long = OUT / "long" / "github"
    long.mkdir(parents=True, exist_ok=True)
    with (RAW / "github" / "python.jsonl").open() as lines:
        text = ""
        while len(text) < 12_000_000:
            text += json.loads(next(lines))["text"]
    (long / "long.jsonl").write_text(json.dumps({"text": text}) + "\n")
    found = []
    for name, tokenizer in tokenizers().items():
        output = OUT / "long_filtered"
        for leftover in (output, output.with_name("long_filtered.work")):
            shutil.rmtree(leftover, ignore_errors=True)
        command = [sys.executable, "data_prep/filter_redpajama.py", f"input={long.parent}"]
        command += [f"output={output}", f"tokenizer={tokenizer}", "workers=1"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        tokens = json.loads((output / "summary.json").read_text())["total"]["tokens"]["in"]
        claim = f"peak memory of a process, one document of {tokens / 1e6:.1f}M tokens, {name}, GiB"
        found.append(ratio(claim, [peak], "<", 2.0, {}))
    return found


# --- the loader -----------------------------------------------------------------------------------


def measure_loader(rounds: int) -> list[dict[str, Any]]:
    """Tokens/s of the loader alone over those of the lab trainer, on one core, in turn."""
    import tempfile

    import torch

    from longctx import cli
    from longctx.config import RunConfig
    from longctx.parallel import mesh
    from longctx.recipes.causal_lm import RECIPE
    from longctx.train.trainer import Trainer

    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["recipe=pi", "recipe_model=pi_lab_demo", "logger=none", "data.prefetch=0"]
        arguments += [f"run_dir={folder}/run", "train.max_steps=100000"]
        run = cli.compose(arguments, RunConfig, "train", "run_schema")
        trainer = Trainer(run, RECIPE, mesh.start())
        data = trainer.data.train
        shares, loader_speed, trainer_speed = [], 0.0, 0.0
        for turn in range(rounds + 1):  # the first is a warm-up
            begin = time.perf_counter()
            tokens = sum(trainer.train_step(4 * turn + i).tokens for i in range(4))
            trainer_speed = tokens / (time.perf_counter() - begin)
            steps = range(1000 * (turn + 1), 1000 * (turn + 1) + 200)
            begin = time.perf_counter()
            tokens = sum(batch.tokens.numel() for n in steps for batch in data.step(n, 0, 1))
            loader_speed = tokens / (time.perf_counter() - begin)
            if turn:
                shares.append(loader_speed / trainer_speed)
    facts = {"loader_tokens_per_second": loader_speed, "trainer_tokens_per_second": trainer_speed}
    return [ratio("loader over what the lab trainer takes in, one core", shares, ">=", 20, facts)]


def main() -> None:
    """Measures one part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", help="corpus, filter, memory, loader, index or packing")
    parser.add_argument("--rounds", type=int, default=3, help="turns of the two sides")
    parser.add_argument("--write", action="store_true", help="keep the JSON")
    parser.add_argument("--tokenizer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "corpus":
        corpus()
    elif options.part == "_bare":
        print(json.dumps(bare(options.tokenizer)))
    elif options.part == "_pipeline":
        print(json.dumps(pipeline(options.tokenizer, options.workers)))
    else:
        from benchmarks import data_index

        measure = {
            "filter": lambda: measure_filter(options.rounds),
            "memory": measure_memory,
            "loader": lambda: measure_loader(options.rounds),
            "index": lambda: data_index.measure(OUT, options.rounds),
            "packing": data_index.packing,
        }
        claims = measure[options.part]()
        if options.write:
            keep(options.part, claims)


if __name__ == "__main__":
    main()
