"""Raw corpora -> token stores of long documents: `python data_prep/filter_redpajama.py --help`.

Plans the work, runs it through datatrove (`executors.py`) and prints a summary.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from longctx.data_prep.settings import FilterConfig
from longctx.errors import UserError

NEEDED = ("datatrove", "orjson", "zstandard")  # the extra `prep`


def main(config: FilterConfig) -> None:
    """Creates the token stores in `config.output`.

    Raises:
        UserError: if a setting or an input is wrong (nothing is written then), or a task fails.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UserError(f"{missing[0]} is not installed: pip install -e '.[prep]'")
    from longctx.data_prep import executors
    from longctx.data_prep.assemble import SUMMARY, AssembleStep
    from longctx.data_prep.summary import table

    job = plan(config)
    step: AssembleStep = job.assemble
    before = job.work.submitted
    output = config.output_path
    if output.exists():
        done = _read(output / SUMMARY)
        if done.get("identity") != step.rules.identity(job.work):
            raise UserError(
                f"{output} exists already, and not from these inputs and settings: "
                "remove it, or choose another output="
            )
        print(f"{output}: already done")
        return
    try:
        number = executors.run(config.executor.name, job)
    except KeyboardInterrupt:
        print("interrupted: the same command continues from here", file=sys.stderr)
        raise SystemExit(130) from None
    if number:
        if before:
            print(f"job {before} was submitted for this before")
        print(
            f"submitted: {job.work.tasks} tasks, then job {number} that makes {output}; "
            f"logs in {job.work.folder / 'logs'}"
        )
        return
    print(table(_read(output / SUMMARY)))
    print(f"\n{output}: done. {job.work.folder} may be deleted; kept, it saves tokenising again")


def plan(config: FilterConfig) -> Any:
    """The job for `executors.run`; reads the inputs' names, the tokenizer and evaluation texts.

    Returns:
        A `longctx.data_prep.executors.Job`.
    """
    from longctx.data_prep.assemble import AssembleStep, Rules
    from longctx.data_prep.decontaminate import Evaluation
    from longctx.data_prep.encode import load_encoder
    from longctx.data_prep.executors import Job, check_options
    from longctx.data_prep.inputs import deal, domain_name, find_pieces
    from longctx.data_prep.tokenize_step import TokenizeStep
    from longctx.data_prep.work import Work, plan_text

    check_options(config.executor.name, config.executor.options)
    _check_places(config)
    domains = sorted({domain_name(name) for name in config.domains})
    tokenizer = Path(config.tokenizer).resolve()
    encoder = load_encoder(tokenizer)
    files, titles = (
        tuple(Path(path).resolve() for path in paths)
        for paths in (config.evaluation_files, config.evaluation_titles)
    )
    evaluation = (files, titles, config.evaluation_window, config.evaluation_fraction)
    deciding = {
        "tokenizer": encoder.sha256,
        "ids": [encoder.vocab_size, encoder.bos_id, encoder.eos_id],
        "evaluation": Evaluation.load(*evaluation).identity,
        "domains": domains,
        "min_bytes": config.min_bytes,
    }
    min_tokens_of = {domain_name(name): n for name, n in (config.min_tokens_of or {}).items()}
    pieces = find_pieces(config.inputs, domains, config.split_bytes)
    _check_domains(domains, list(min_tokens_of), pieces)
    text = plan_text(deal(pieces, config.split_bytes), deciding)
    work = Work.of(config.work_path, text)
    rules = Rules(
        config.inputs, config.min_tokens, min_tokens_of, config.deduplicate, domains,
        config.max_bad_fraction,
    )  # fmt: skip
    tokenize = TokenizeStep(work.folder, tokenizer, evaluation, domains, config.min_bytes)
    assemble = AssembleStep(work.folder, config.output_path, rules)
    return Job(work, text, tokenize, assemble, config.workers, config.executor.options)


def _check_domains(domains: list[str], limited: list[str], pieces: list[Any]) -> None:
    """Raises UserError for a domain that no record can have."""
    from longctx.data_prep.inputs import RED_PAJAMA

    if domains and (left := [name for name in limited if name not in domains]):
        raise UserError(f"min_tokens_of.{left[0]}: {left[0]} is not one of domains={domains}")
    there = {piece.domain for piece in pieces}
    unknown = [x for x in [*domains, *limited] if x not in there and x not in RED_PAJAMA]
    if unknown and all(piece.placed for piece in pieces):
        raise UserError(
            f"domain {unknown[0]} does not occur in the input, which has {', '.join(sorted(there))}"
        )


def _check_places(config: FilterConfig) -> None:
    for place in (config.output_path, config.work_path):
        for text in config.inputs:
            root = Path(text).resolve()
            if root.is_dir() and place.resolve().is_relative_to(root):
                raise UserError(f"{place} is inside input={text}, so the next run would read it")


def _read(path: Path) -> dict[str, Any]:
    try:
        found: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


if __name__ == "__main__":
    from longctx import cli

    cli.run(main, FilterConfig, "filter_redpajama", "filter_schema", cli.CONF / "data_prep")
