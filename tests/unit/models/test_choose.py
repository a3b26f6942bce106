import pytest

from longctx.errors import UserError
from longctx.models.choose import attention_method


@pytest.mark.parametrize(
    ("method", "key", "value", "kind"),
    [
        ("dca", "chunk_len", "abc", "a whole number"),
        ("dca", "chunk_len", 1.5, "a whole number"),
        ("dca", "chunk_len", True, "a whole number"),
        ("dca", "chunk_len", {"a": 1}, "a whole number"),
        ("dca", "length_temperature", "x", "a number"),
        ("dca", "preset", 3, "a name"),
        ("lm_infinite", "first", None, "a whole number"),
        ("longgen_blocks", "heads_share", 1, "true or false"),
        ("longgen_window", "full_layers", [1.5], "a name or a list of whole numbers"),
    ],
)
def test_a_number_of_another_type_is_named(method, key, value, kind):
    with pytest.raises(UserError) as caught:
        attention_method({"name": method, key: value})
    assert str(caught.value) == f"attention.{key}={value!r} must be {kind}"


def test_numbers_are_taken():
    assert attention_method({"name": "dca", "length_temperature": 1}).length_temperature == 1
    assert attention_method({"name": "dca", "chunk_len": None}).chunk_len is None
    assert attention_method({"name": "longgen_window", "full_layers": [0, 2]}).full_layers
