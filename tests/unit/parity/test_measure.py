"""The certificate's processes see no GPU, and the one that starts them keeps its own view."""

import os

from longctx.parity import measure


def test_ranks_start_without_gpus(monkeypatch):
    seen = {}
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")  # as importing deepspeed leaves it beside a GPU
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(measure.torch.multiprocessing, "spawn", lambda *_: seen.update(os.environ))
    before = dict(os.environ)
    measure.on_ranks(2, print)
    assert (seen["CUDA_VISIBLE_DEVICES"], seen["DS_ACCELERATOR"]) == ("", "cpu")
    assert dict(os.environ) == before
