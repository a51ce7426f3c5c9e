"""Worlds whose exact answers are known: `WORLDS`, by name."""

import functools

from examples.worlds import chains, detour, misconceptions, stories, sums
from examples.worlds.world import World

_ALL = (
    World("sums", sums.all_problems, sums.grammar, (4.0,), (0.25,)),
    World("detour", detour.all_problems, detour.grammar, (4.0,), (0.25,)),
    World("stories", detour.all_problems, stories.grammar, (0.5,), (2.0,)),
    World(
        "stories_unequal",
        detour.all_problems,
        functools.partial(stories.grammar, is_unequal=True),
        (0.5,),
        (2.0,),
        max_tokens=40,
    ),
    World(
        "misconceptions",
        misconceptions.all_problems,
        misconceptions.grammar,
        (2.0, 4.0, 8.0),
        (0.25,),
    ),
    World(
        "chains",
        chains.all_problems,
        chains.grammar,
        (2.0, 4.0),
        (0.25,),
        is_listable=False,
        num_train=512,
        max_tokens=256,
        batch_size=24,
    ),
)
WORLDS: dict[str, World] = {world.name: world for world in _ALL}
