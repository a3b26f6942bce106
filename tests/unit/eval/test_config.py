import pytest

from longctx import cli
from longctx.config import RopeConfig
from longctx.errors import UserError
from longctx.eval.config import EvalConfig

WANTED = ["lengths=[512,2048]", "out=x", "held_out=y"]


def compose(*more):
    return cli.compose([*WANTED, *more], EvalConfig, "evaluate", "eval_schema")


@pytest.mark.parametrize("effort", ["quick", "paper"])
def test_efforts_compose(effort):
    cfg = compose(f"effort={effort}")
    assert isinstance(cfg, EvalConfig) and cfg.attention is None and cfg.scaling is None
    assert cfg.tasks == ["perplexity", "passkey", "k_max"]


def test_the_paper_s_numbers():
    cfg = compose("effort=paper")
    assert (cfg.perplexity.stride, cfg.perplexity.document_tokens) == (256, None)
    assert (cfg.k_max.points, cfg.samples, cfg.k_max.threshold) == (32, 10, 0.2)


def test_tasks_that_read_contexts_need_no_lengths_and_rope_reaches_their_input():
    more = ["lengths=[]", "tasks=[contexts]", "rope=pi", "contexts.counts=[4,8]"]
    cfg = compose("effort=paper", *more)
    assert cfg.longest == 8 * 256 + 4096 == cfg.scaling.target
    cfg = compose("lengths=[]", "tasks=[qa]", "qa.data=x", "qa.window=3000", "rope=pi")
    assert cfg.scaling.target == 3000
    assert compose("lengths=[]", "tasks=[qa]", "qa.data=x").longest is None
    with pytest.raises(UserError, match="at least one each"):
        compose("lengths=[]", "tasks=[contexts,passkey]")


def test_the_paper_s_passages():
    cfg = compose("effort=paper")
    assert cfg.qa.passages == [10, 15, 20, 30, 60] and cfg.qa.decoder_passages == 10
    own = cfg.retrieval_perplexity
    assert own.decoder_tokens - own.query_tokens == 1792 and own.passages == [0, 8, 20, 50]


@pytest.mark.parametrize("name", ["pi", "ntk", "yarn", "dynamic_ntk"])
def test_rope_reaches_the_longest_length_unless_told(name):
    scaling = compose(f"rope={name}").scaling
    assert scaling is not None and scaling.name == name
    if name != "dynamic_ntk":
        assert scaling.target == 2048
    assert compose(f"rope={name}", "rope.target=999").scaling.target == 999
    assert compose(f"rope={name}", "rope.factor=3").scaling == RopeConfig(
        name, 3.0, None, *((32, 1) if name == "yarn" else (None, None))
    )


def test_attention_is_that_of_the_checkpoint_or_of_the_group():
    assert compose("attention=full").attention == {"name": "full"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tasks=[]", "at least one"),
        ("lengths=[]", "at least one"),
        ("lengths=[] tasks=[passkey,qa] compare=[x]", "at least one"),
        ("lengths=[1]", "at least 2"),
        ("samples=0", "samples=0 must be above 0"),
        ("dtype=int8", "dtype='int8'"),
        ("passkey.depths=[0,2]", "from 0 to 1"),
        ("passkey.mode=guess", "passkey.mode='guess'"),
        ("k_max.threshold=0", "threshold=0"),
        ("perplexity.protocols=[rolling]", "single_pass_buckets"),
        ("perplexity.target_tokens=512", "target_tokens=512 must be shorter"),
        ("qa.passages=[0]", "qa.passages="),
        ("contexts.size=0", "contexts.size=0"),
        ("retrieval_perplexity.temperature=0", "temperature=0"),
    ],
)
def test_bad_values(change, message):
    with pytest.raises(UserError, match=message):
        compose(*change.split())
