"""psi(y): the format term, a value in nats a token inside the PowerFlow bracket."""

import numpy as np

from pfjax.evaluation.grading import last_boxed


def format_term(responses: list[str], unboxed: float) -> np.ndarray:
    r"""`unboxed` for a response without a closed `\boxed{...}`, else 0; float32 [S].

    References:
      PowerFlow, arXiv 2603.18363, Eq. 10 (there -0.5).
    """
    has_box = [last_boxed(text) is not None for text in responses]
    return np.where(has_box, 0.0, unboxed).astype(np.float32)
