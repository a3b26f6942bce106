import pytest

from longctx import cli
from longctx.errors import UserError
from longctx.eval.config import EvalConfig

METHODS, ROPES = (
    ", ".join(sorted(path.stem for path in (cli.CONF / group).glob("*.yaml")))
    for group in ("attention", "rope")
)
NUMBERS = "; give its numbers as attention.KEY=VALUE"
GOOD = ["tasks=[passkey]", "lengths=[256]", "out=x"]


def compose(*arguments):
    return cli.compose([*GOOD, *arguments], EvalConfig, "evaluate", "eval_schema")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("+attention={name: x}", f"attention={{name: x}} is not one of {METHODS}{NUMBERS}"),
        ("attention={foo: 3}", f"attention={{foo: 3}} is not one of {METHODS}{NUMBERS}"),
        ("++attention=[1,2]", f"attention=[1,2] is not one of {METHODS}"),
        ("attention=3", f"attention=3 is not one of {METHODS}"),
        ("+attention.name=dca", f"+attention.name=dca needs attention=NAME too, one of {METHODS}"),
        ("rope=[pi]", f"rope=[pi] is not one of {ROPES}"),
        ("rope=1e3", f"rope=1e3 is not one of {ROPES}"),
        ("rope=null", f"rope=null is not one of {ROPES}"),
    ],
)
def test_what_is_no_name_of_a_choice_is_one_line(argument, message):
    with pytest.raises(UserError) as caught:
        compose(argument)
    assert str(caught.value) == message


def test_names_and_their_numbers_are_taken():
    cfg = compose("attention=dca", "attention.chunk_len=64", "rope={name: pi, factor: 2}")
    assert cfg.attention["name"] == "dca" and cfg.attention["chunk_len"] == 64
    assert cfg.rope.name == "pi" and cfg.rope.factor == 2
    assert compose("attention=null").attention is None


@pytest.mark.parametrize("path", [".", "1000"])
def test_a_model_may_be_a_directory_of_any_name(path, tmp_path, monkeypatch):
    (tmp_path / "1000").mkdir()
    monkeypatch.chdir(tmp_path)
    assert compose(f"model={path}").model.path == str((tmp_path / path).resolve())
