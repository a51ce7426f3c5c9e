"""Text files are UTF-8 wherever the machine is: some have a locale of Latin letters alone."""

import ast

from tests.conftest import ROOT

# What these open or read themselves is UTF-8, or no text.
_OTHERS = ("storage", "os", "safetensors", "gzip")


def _follows_the_locale(call: ast.Call) -> bool:
    """Whether it reads or writes text in what encoding the machine happens to have."""
    f, n = call.func, len(call.args)
    if any(x.arg == "encoding" for x in call.keywords):
        return False
    if isinstance(f, ast.Attribute):
        if ast.unparse(f.value) in _OTHERS:
            return False
        if f.attr in ("read_text", "write_text"):
            return n < (1 if f.attr == "read_text" else 2)
        mode = call.args[:1] if f.attr == "open" else None
    else:
        mode = call.args[1:2] if isinstance(f, ast.Name) and f.id == "open" else None
    modes = [x.value for x in call.keywords if x.arg == "mode"]
    return mode is not None and not any("b" in ast.unparse(x) for x in mode + modes)


def test_no_text_file_is_in_the_encoding_of_the_machine():
    folders = ("pfjax", "examples", "configs")
    files = [x for folder in folders for x in (ROOT / folder).rglob("*.py")]
    files.append(ROOT / "setup.py")
    assert len(files) > 100
    for path in files:
        nodes = ast.walk(ast.parse(path.read_bytes()))
        calls = [x for x in nodes if isinstance(x, ast.Call)]
        found = [ast.unparse(x) for x in calls if _follows_the_locale(x)]
        assert not found, (path, found)
