"""What a run is given, told from one version to another."""

from configs import default
from pfjax.model import tokenizer
from pfjax.tasks import data, rewards
from pfjax.tasks.problems import Problem
from pfjax.trainer import inputs


def _given(level):
    columns = {"prompt": "1+2", "level": level}
    prompts = data.PromptSet([Problem("0", "1+2", None, columns=columns)], [[1, 2]])
    return inputs.Inputs(prompts, {})


def test_columns_and_code_decide_where_a_reward_reads_them(tmp_path):
    tok, code = tokenizer.load("pfjax/toy"), tmp_path / "mine.py"
    mine = f"{code}:reward"

    def of(level, terms, text="1"):
        code.write_text(text)
        with rewards.Reward(terms) as reward:
            args = (default.get_config(), _given(level), tok, None, {})
            return inputs.fingerprints(*args, reward, rewards.Reward(""))

    assert of(1, "") == of(2, "") == of(1, "accuracy")
    a, b, c = of(1, mine), of(2, mine), of(1, mine, "2")
    assert {k for k in a if a[k] != b[k]} == {"columns of the prompts"}
    assert {k for k in a if a[k] != c[k]} == {"code of the reward"}
