"""What a run is given, told from one version to another."""

from pfjax.model import tokenizer
from pfjax.tasks import data
from pfjax.tasks.problems import Problem
from pfjax.trainer import inputs


def _given(level):
    columns = {"prompt": "1+2", "level": level}
    prompts = data.PromptSet([Problem("0", "1+2", None, columns=columns)], [[1, 2]])
    return inputs.Inputs(prompts, {})


def test_columns_decide_where_a_reward_reads_them():
    tok = tokenizer.load("pfjax/toy")
    of = lambda level, reads: inputs.fingerprints(
        _given(level), tok, None, adapter="", base="", reads_columns=reads
    )
    assert of(1, False) == of(2, False)
    a, b = of(1, True), of(2, True)
    assert {k for k in a if a[k] != b[k]} == {"columns of the prompts"}
