"""Writers that survive a kill."""

import json

import numpy as np
from etils import epath

from pfjax.infra.dataset_io import read_jsonl
from pfjax.trainer import logging


def test_writer_cuts_back_to_the_step_it_continues_from(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "x": s / 2}) + "\n" for s in range(5))
        + '{"step": 5, "x'  # killed while writing
    )
    writer = logging.Writer(epath.Path(tmp_path), last_step=2)
    writer.write(3, {"x": np.float32(9)})
    writer.close()
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2, 3]
    assert rows[-1]["x"] == 9.0 and writer.history == rows
    assert list(tmp_path.glob("events.out.tfevents*"))
