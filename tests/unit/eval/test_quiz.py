import pytest
import torch

from longctx.data.passkey_text import Passkey
from longctx.eval.quiz import Quiz, Trial, grid, run_trials
from tests.helpers.fakes import characters, copier, noise


def quiz(model, samples=2, mode="teacher_forced", batch_tokens=4096):
    return Quiz(model, characters, None, samples, 0, mode, batch_tokens)


def test_a_copier_scores_all_and_noise_nothing():
    result, samples = grid(quiz(copier()), [400, 700], [0, 0.5, 1], task="passkey")
    assert [c["rate"] for c in result["cells"]] == [1.0] * 6 and result["mean"] == 1
    assert [(c["length"], c["depth"]) for c in result["cells"]][:2] == [(400, 0), (400, 0.5)]
    assert len(samples) == 12
    for sample in samples:
        assert sample["predicted"] == characters(f" {sample['key']}") and sample["correct"]
        assert sample["length"] - 30 < sample["tokens"] <= sample["length"]
    result, samples = grid(quiz(noise()), [400, 700], [0, 0.5, 1], task="passkey")
    assert result["mean"] == 0 and not any(s["correct"] for s in samples)


def test_batches_do_not_change_the_answers():
    together, _ = grid(quiz(copier(300)), [400, 500], [0, 0.5, 1], task="passkey")
    model = copier(300)
    alone, _ = grid(quiz(model, batch_tokens=1), [400, 500], [0, 0.5, 1], task="passkey")
    assert alone == together and 0 < alone["mean"] < 1
    assert {shape[0] for shape in model.shapes} == {1}


def test_a_prompt_longer_than_asked_is_refused():
    with pytest.raises(AssertionError, match="never truncated"):
        Trial(Passkey([1] * 9, (8, 9), "1", 3), 8, 0.5, None, 0)


def test_teacher_forced_equals_generate():
    """Answers are the model's own continuations, every other one spoilt at one token."""
    from longctx.models.load import build_model

    model = build_model(
        {
            "model_type": "llama",
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        },
        seed=3,
    )
    generator = torch.Generator().manual_seed(0)
    trials = []
    for i in range(12):
        prompt = torch.randint(3, 64, (1, 20 + i), generator=generator)
        with torch.no_grad():
            own = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
        tokens = own[0].tolist()
        if len(tokens) < prompt.shape[1] + 5:
            continue  # it wrote its end token
        if i % 2:
            tokens[-1 - i % 5] = (tokens[-1 - i % 5] + 1) % 64
        trials.append(Trial(Passkey(tokens, (len(tokens) - 5, len(tokens)), "", 0), 64, 0, None, i))
    answers = {
        mode: [s["correct"] for s in run_trials(quiz(model, mode=mode), trials, len(trials), "t")]
        for mode in ("teacher_forced", "generate")
    }
    assert answers["teacher_forced"] == answers["generate"] == [t.index % 2 == 0 for t in trials]
    assert len(set(answers["generate"])) == 2
