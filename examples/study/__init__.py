"""The paper's comparison on the toy task."""
