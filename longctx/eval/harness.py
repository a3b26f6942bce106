"""Multiple-choice tasks of lm-eval's, or of its format, asked through lm-eval itself.

The prompts and scores are lm-eval's; ours is only that a prompt beyond the model's window is an
error, where lm-eval cuts it from the left and warns. One process asks; the others wait for it.
Costs one short forward a choice, in batches of 8, and seconds to look through lm-eval's tasks.
Source: lm-eval 0.4.13.
"""

from collections.abc import Sequence
from typing import Any

from longctx.errors import UserError
from longctx.eval.answers import wilson
from longctx.eval.subject import Subject

BATCH = 8
OFFLINE = "short.tasks=[continuation] needs held_out= alone"


def harness(tasks: Sequence[str]) -> Any:
    """The package lm_eval.

    Args:
        tasks: that need it, for the error.

    Raises:
        UserError: if it is not installed.
    """
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise UserError(
            f"short.tasks=[{','.join(tasks)}] need lm-eval: pip install 'longctx[short]' "
            f"({error}); short.tasks=[continuation] does not"
        ) from error
    return lm_eval


def ask(
    task: str, subject: Subject, include: str | None, samples: int | None, seed: int
) -> dict[str, Any]:
    """One task: its accuracy as lm-eval gives it, without our records.

    Args:
        task: its name.
        subject: the model under test.
        include: folder of more task files; None: lm-eval's alone.
        samples: most questions; None: all.
        seed: of what lm-eval draws.

    Returns:
        A row of the result.

    Raises:
        UserError: if there is no such task, its data cannot be had, or a prompt is too long.
    """
    lm_eval = harness([task])
    known = lm_eval.tasks.TaskManager(include_path=include)
    if task not in known.all_tasks:
        where = include or "lm-eval"
        raise UserError(f"short.tasks=[{task}]: {where} has no such task")
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"), seed)
    try:
        found = lm_eval.simple_evaluate(
            model=_reader(lm_eval, task, subject),
            tasks=[task],
            task_manager=known,
            limit=samples,
            bootstrap_iters=1,
            log_samples=False,
            **seeds,
        )
    except OSError as error:
        words = " ".join(str(error).split())[:200]
        raise UserError(
            f"short.tasks=[{task}]: lm-eval cannot get its data ({words}); {OFFLINE}"
        ) from error
    return _row(task, found["results"][task], found["n-samples"])


def _reader(lm_eval: Any, task: str, subject: Subject) -> Any:
    """The model as lm-eval asks it, whole prompts only."""
    window = int(subject.model.config.max_position_embeddings)

    class Whole(lm_eval.models.huggingface.HFLM):  # type: ignore[misc]
        def _loglikelihood_tokens(self, requests: Any, *others: Any, **more: Any) -> Any:
            for number, (_, prompt, choice) in enumerate(requests):
                if (tokens := len(prompt) + len(choice)) > window + 1:  # the last is not read
                    raise UserError(
                        f"short.tasks=[{task}]: choice {number} has {tokens} tokens with its "
                        f"prompt, and the model's window has {window}"
                    )
            return super()._loglikelihood_tokens(requests, *others, **more)

        def generate_until(self, *_: Any, **__: Any) -> Any:
            raise UserError(f"short.tasks=[{task}] decodes; only tasks of choices are asked here")

    return Whole(
        pretrained=subject.model,
        tokenizer=subject.tokenizer,
        max_length=window,
        batch_size=BATCH,
    )


def _row(task: str, numbers: dict[str, Any], count: dict[str, Any]) -> dict[str, Any]:
    if "acc,none" not in numbers:
        raise UserError(f"short.tasks=[{task}] reports no accuracy (metric acc)")
    score, asked = float(numbers["acc,none"]), sum(n["effective"] for n in count.values())
    return {
        "kind": task,
        "metric": "acc",
        "samples": asked,
        "score": score,
        # Of the share of right answers, also for a group of tasks that lm-eval weighs by size;
        # its own error of a mean is 0 where all are right.
        "interval": list(wilson(round(score * asked), asked)),
        "guessing": None,
    }
