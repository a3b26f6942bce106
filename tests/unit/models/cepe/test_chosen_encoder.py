"""An encoder's window is a limit, not a size that is already too much."""

from types import SimpleNamespace

import pytest

from longctx.errors import UserError
from longctx.models.cepe.chosen_encoder import require_window


def test_a_context_may_fill_the_window():
    encoder = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=16))
    require_window(encoder, 16, "contexts.size")
    with pytest.raises(UserError, match=r"contexts\.size=17, and the encoder reads 16"):
        require_window(encoder, 17, "contexts.size")
