"""The public names: one list for those who import, one for type checkers, one for `import *`."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

import nemotron_h


def test_every_list_of_names_is_the_same() -> None:
    tree = ast.parse(Path(nemotron_h.__file__).read_text(encoding="utf-8"))
    [typed] = [node for node in tree.body if isinstance(node, ast.If)]
    homes = {
        name.name: str(node.module).removeprefix("nemotron_h.")
        for node in typed.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    assert homes == nemotron_h._HOMES
    assert sorted(nemotron_h.__all__) == sorted(homes)


@pytest.mark.parametrize("name", nemotron_h.__all__)
def test_a_name_is_that_of_its_home(name: str) -> None:
    home = import_module(f"nemotron_h.{nemotron_h._HOMES[name]}")
    assert getattr(nemotron_h, name) is getattr(home, name)


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="'nemotron_h' has no attribute 'Tokeniser'"):
        _ = nemotron_h.Tokeniser
