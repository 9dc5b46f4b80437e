"""What a chat template may say, and the tree it is compiled from.

A template comes with a checkpoint, and templates need little: statements, filters and tests are those listed here,
others are refused by name before anything runs. In the tree each literal becomes a call that marks it, each `~` a call
that keeps marks, each list or slice a call that counts it, and each turn of a loop begins with a step; `render.py`
answers them.
"""

import math

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.tests import TESTS as JINJA_TESTS
from jinja2.visitor import NodeTransformer


class RefusedError(Exception):
    """The template itself is at fault: broken, beyond a bound, or asking for what it may not have."""


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


STATEMENTS = (
    *(nodes.Output, nodes.For, nodes.If, nodes.Macro, nodes.CallBlock, nodes.FilterBlock),
    *(nodes.With, nodes.Assign, nodes.AssignBlock, nodes.Break, nodes.Continue),
)
FILTERS = words(
    """
    abs capitalize count d default dictsort first float indent int items join last length list lower map max min reject
    rejectattr replace reverse safe select selectattr sort string title tojson trim unique upper
    """
)
TESTS = frozenset(JINJA_TESTS) - {"callable", "escaped", "filter", "test"}


class GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` around what the assistant says, as in transformers."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(_call("generation"), [], [], body, lineno=line)


def check(tree: nodes.Template) -> None:
    """Refuse by name what the template may not use."""
    for statement in tree.find_all(nodes.Stmt):
        if not isinstance(statement, STATEMENTS):
            raise RefusedError(f"uses a statement of the kind {type(statement).__name__}")
    for kind, known in ((nodes.Filter, FILTERS), (nodes.Test, TESTS)):
        for node in tree.find_all(kind):
            if node.name not in known:
                what, names = kind.__name__.lower(), ", ".join(sorted(known))
                raise RefusedError(f"uses the {what} {node.name!r} in line {node.lineno}; known are {names}")
    for name in tree.find_all(nodes.Name):
        if name.name in ("varargs", "kwargs"):  # lists of jinja2's own making, which nothing here would count
            raise RefusedError(f"uses {name.name} in line {name.lineno}; name the macro's arguments")
    for const in tree.find_all(nodes.Const):
        if isinstance(const.value, float) and not math.isfinite(const.value):  # jinja2 compiles it to the name `inf`
            raise RefusedError(f"writes a number beyond floats in line {const.lineno}")


class Rewriter(NodeTransformer):
    """The tree with calls of `render.py` where text, lists and turns of loops are made."""

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return _call("literal", nodes.Const(node.data))

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        return _call("literal", node) if isinstance(node.value, str) else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("joined", *node.nodes)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._built(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._built(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self.generic_visit(node) if node.ctx == "store" else self._built(node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        # jinja2 compiles a slice to Python's own, past the environment
        borders = (node.arg.start, node.arg.stop, node.arg.step)
        return _call("sliced", node.node, *(border or nodes.Const(None) for border in borders))

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("tick")))
        if node.test is not None:
            node.test = nodes.And(_call("tick"), node.test)
        return node

    def _built(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _call("built", node)


def _call(name: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)
