"""Rewards by a judge: a language model behind an endpoint that speaks OpenAI's protocol.

`judge:FILE.toml` names a file that says where it is and what it is asked:

    url = "http://localhost:8000/v1"
    model = "Qwen/Qwen2.5-7B-Instruct"
    scale = [0, 10]
    prompt = '''
    How good is the answer, from 0 to 10? Reply with the number alone.
    Question: {prompt}
    Answer: {completion}'''

`{answer}` is the prompt's answer; `[options]` are sent with each request, as they are.
"""

import asyncio
import contextlib
import json
import math
import os
import random
import re
import tomllib
import urllib.parse
from typing import Any, NamedTuple

from pfjax.infra import storage
from pfjax.tasks.reward_functions import Failed, count_failed
from pfjax.tasks.reward_worker import wait_for

# The environment variable that holds the key of the endpoint; without it none is sent.
KEY = "PFJAX_JUDGE_KEY"
# Requests under way at once.
_CONCURRENT = 32
# What may pass: too many requests, and servers that are busy or restart.
_TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.5, 30.0
_FIELD = re.compile(r"\{(prompt|completion|answer)\}")
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


class JudgeConfig(NamedTuple):
    url: str  # up to /v1
    model: str
    prompt: str  # with {completion}, and perhaps {prompt} and {answer}
    scale: tuple[float, float]  # least and greatest score
    options: dict[str, Any]  # of the request, beside model and messages


def read(path: str) -> JudgeConfig:
    """Reads the file of a judge.

    Raises:
      ValueError: if it cannot be read, or says too little or too much.
    """
    try:
        values = tomllib.loads(storage.read_text(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"judge {path}: {error}") from None
    values = {"options": {}} | values
    if values.keys() != set(JudgeConfig._fields):
        odd = sorted(values.keys() ^ set(JudgeConfig._fields))
        raise ValueError(
            f"judge {path}: needs url, model, prompt and scale, may have [options], and "
            f"nothing else; look at {', '.join(odd)}"
        )
    for name in ("url", "model", "prompt"):
        if not isinstance(values[name], str):
            got = f"got {values[name]!r}"
            raise ValueError(f"judge {path}: {name} must be text, {got}")  # noqa: TRY004
    try:
        parts = urllib.parse.urlsplit(values["url"])
        is_url = (
            parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        )
        json.dumps(values["options"], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"judge {path}: {error}") from None
    if not is_url:
        got = f"got {values['url']!r}"
        raise ValueError(f"judge {path}: url must be http://HOST/v1, or https, {got}")
    if "{completion}" not in values["prompt"]:
        raise ValueError(f"judge {path}: the prompt must contain {{completion}}")
    match values["scale"]:
        case [int() | float() as low, int() | float() as high] if low < high:
            return JudgeConfig(**values | {"scale": (float(low), float(high))})
    raise ValueError(
        f"judge {path}: scale must be the least and the greatest score, such as [0, 10], "
        f"got {values['scale']}"
    )


def score_of(reply: str, scale: tuple[float, float]) -> float:
    """The score that a reply gives: its last line, a number of the scale and nothing else.

    Raises:
      Failed: if it gives none.

    >>> score_of("It is right, but long.\\n7", (0.0, 10.0))
    7.0
    """
    lines = reply.strip().splitlines()
    low, high = scale
    if lines and _NUMBER.fullmatch(lines[-1].strip()):
        value = float(lines[-1])
        if low <= value <= high:
            return value
    raise Failed(
        f"the reply {reply[-80:]!r} does not end with a line that is a number from "
        f"{low:g} to {high:g}"
    )


class Judge(contextlib.AbstractContextManager):
    """A judge; `failures` counts responses without a score.

    Args:
      spec: named in errors.
      path: of its file, see `read`.
      seconds: of wall time for a response, requests that are repeated included.
    """

    def __init__(self, spec: str, path: str, seconds: float = 10.0):
        self.spec, self.failures = spec, 0
        self._config, self._seconds = read(path), seconds

    def __exit__(self, *unused) -> None:
        pass

    def check(self) -> None:
        """Raises ValueError if the judge gives no score to a trivial response."""
        question = {"prompts": ["1+1"], "completions": ["2"], "answer": ["2"]}
        self([question])

    def __call__(self, groups: list[dict[str, list]]) -> list[list[float]]:
        """Scores of groups of responses, NaN where there is none; as `RewardFunction`."""
        texts = [self._texts(group) for group in groups]
        reasons: list[str] = []
        flat = iter(
            wait_for(self._scores([x for some in texts for x in some], reasons))
        )
        out = [[next(flat) for _ in some] for some in texts]
        self.failures += count_failed(self.spec, out, reasons)
        return out

    def _texts(self, group: dict[str, list]) -> list[str]:
        """What is asked of each response of a group."""
        rows = zip(group["prompts"], group["completions"], group["answer"], strict=True)
        return [self._ask(*row) for row in rows]

    def _ask(self, prompt: Any, completion: Any, answer: Any) -> str:
        values = {"prompt": _text(prompt), "completion": _text(completion)}
        if "{answer}" in self._config.prompt:
            if answer is None:
                raise ValueError(
                    f"--config.reward={self.spec} asks for {{answer}}, which the prompt "
                    f"{values['prompt'][:60]!r} has none of"
                )
            values["answer"] = str(answer)
        return _FIELD.sub(lambda m: values[m[1]], self._config.prompt)

    async def _scores(self, texts: list[str], reasons: list[str]) -> list[float]:
        import httpx2

        places = asyncio.Semaphore(_CONCURRENT)
        key = os.environ.get(KEY, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"{KEY} has characters that no key can have")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # Each response has a limit of its own, below.
        async with httpx2.AsyncClient(headers=headers, timeout=None) as client:

            async def score(text: str) -> float:
                try:
                    async with places:
                        reply = await self._reply(client, text)
                    return score_of(reply, self._config.scale)
                except Failed as error:
                    reasons.append(str(error))
                    return math.nan

            return await asyncio.gather(*map(score, texts))

    async def _reply(self, client: Any, text: str) -> str:
        """The reply to a request, which is repeated while that may help.

        Raises:
          Failed: if there is none in time.
        """
        wait, last = _FIRST_WAIT_SECONDS, "no reply"
        try:
            async with asyncio.timeout(self._seconds):
                while True:
                    found, last, after = await self._request(client, text)
                    if found is not None:
                        return found
                    # Not all at once again.
                    spread = wait * random.uniform(0.5, 1.0)
                    await asyncio.sleep(max(after, spread))
                    wait = min(2 * wait, _LONGEST_WAIT_SECONDS)
        except TimeoutError:
            limit = f"{self._seconds:g} s (reward_seconds)"
            raise Failed(f"{last}; given up after {limit}") from None

    async def _request(self, client: Any, text: str) -> tuple[str | None, str, float]:
        """The reply; or None, why there is none, and the seconds that the server asks to
        wait for."""
        import httpx2

        c = self._config
        body = {"model": c.model, "messages": [{"role": "user", "content": text}]}
        url = f"{c.url.rstrip('/')}/chat/completions"
        try:
            response = await client.post(url, json=c.options | body)
        except httpx2.HTTPError as error:
            return None, f"{url}: {type(error).__name__} {error}".strip(), 0.0
        said = f"{url} answers {response.status_code} {response.reason_phrase}"
        if response.status_code in _TRANSIENT:
            after = response.headers.get("Retry-After", "")
            return None, said, float(after) if _NUMBER.fullmatch(after) else 0.0
        if response.status_code != 200:
            raise Failed(f"{said}: {' '.join(response.text.split())[:200]}")
        return _content(response.text), "", 0.0


def _content(content: str) -> str:
    """The text of a reply. Raises Failed if there is none, or if it was cut."""
    try:
        choice = json.loads(content)["choices"][0]
        text, end = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise Failed(f"no reply of a chat: {content[:80]!r}") from None
    if not isinstance(text, str):
        raise Failed(f"a reply without text, finish_reason {end}")
    if end == "length":
        raise Failed(f"a reply that was cut: {text[-80:]!r}")
    return text


def _text(said: str | list[dict[str, str]]) -> str:
    """Of a prompt or a completion: its text, or its messages with their roles."""
    if isinstance(said, str):
        return said
    if len(said) == 1:
        return said[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in said)
