import string
from datetime import datetime

import pytest

from nemotron_h.text import render
from nemotron_h.text.marked import REPLY, WRITTEN, MarkedText
from nemotron_h.text.render import MessagesError, Program
from nemotron_h.text.syntax import RefusedError

NOON = datetime(2025, 4, 15, 12, 0)


def rendered(source: str, **variables: object) -> MarkedText:
    return Program(source).render(variables, clock=lambda: NOON)


def written(text: MarkedText) -> str:
    """The characters a control token may be made of; a dot for each other."""
    return "".join(letter if mark & WRITTEN else "." for letter, mark in zip(str(text), text.marks, strict=True))


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("a{{ x }}b", "a.b"),
        ("{{ 'a' + x + 'b' }}{{ 'c' ~ x ~ 1 }}", "a.bc.."),
        ("{{ x + 'a' }}", ".a"),
        ("{% set y = 'a' ~ x %}{{ y }}{{ y | trim }}", "a.a."),
        ("{% set y %}a{{ x }}{% endset %}{{ y }}", "a."),
        ("{% macro m(t) %}a{{ t }}{% endmacro %}{{ m(x) }}{{ m('b') }}", "a.ab"),
        ("{% macro m() %}a{{ caller() }}{% endmacro %}{% call m() %}b{{ x }}{% endcall %}", "ab."),
        ("{% filter upper %}a{{ x }}{% endfilter %}", "A."),
        ("{% for y in [x, 'b'] %}{{ y }}{% endfor %}", ".b"),
        ("{{ ' a ' | trim }}{{ ' a '.strip() }}{{ 'abc'[1:] }}{{ ('a-' ~ x).split('-')[0] }}", "aabca"),
        ("{{ ['a', x] | join('-') }}{{ '-'.join(['a', x]) }}", "a-.a-."),
        ("{{ 'aXa' | replace('X', x) }}{{ 'aXa'.replace('X', x) }}{{ x | replace('u', 'b') }}", "a.aa.ab"),
        ("{{ 'a' if x else 'b' }}{{ x or 'b' }}{{ nothing | default('d') }}{{ 'a' * 3 }}", "a.daaa"),
        ("{{ {'k': 'a'}['k'] }}{{ {'k': x}.k }}{{ namespace(v='a').v }}", "a.a"),
        ("{{ 'a' | tojson }}{{ x | tojson }}{{ 5 | string }}{{ strftime_now('%Y') }}", "..........."),
        ("{{ x | safe }}{{ 'a' | safe }}{{ 'a' | string }}{{ 'ß' | upper }}", ".aa.."),
        ("a  \n  {%- if true %} b {% endif %}\n  {% set y = 1 %}\nc", "a b c"),
    ],
)
def test_what_the_template_wrote_is_marked_and_nothing_else(source: str, wanted: str) -> None:
    assert written(rendered(source, x="u")) == wanted


def test_generation_marks_the_reply_whoever_wrote_it() -> None:
    text = rendered("a{% generation %}b{{ x }}{% endgeneration %}c", x="u")
    assert text == "abuc"
    assert list(text.marks) == [WRITTEN, WRITTEN | REPLY, REPLY, WRITTEN]


def test_what_templates_use() -> None:
    source = """
    {%- for m in ms if m.role != 'tool' -%}
        {%- if m.role == 'stop' %}{% break %}{% endif -%}
        {%- if m.role == 'skip' %}{% continue %}{% endif -%}
        {{ loop.index0 }}{{ m['role'] | title }}{{ m.get('x', '-') }}
        {%- for k, v in m.args | items %} {{ k }}={{ v | tojson(indent=1) }}{% endfor %};
    {%- endfor %} {{ strftime_now('%d %B %Y') }} {{ ms | selectattr('role', 'equalto', 'user') | list | length }}
    {%- with a = ms[1:] %} {{ a | length }}{% endwith %} {{ {'é': '<'} | tojson }}"""
    roles = [
        {"role": "user", "args": {"é": [1]}},
        {"role": "tool"},
        {"role": "skip"},
        {"role": "stop"},
        {"role": "user"},
    ]
    assert rendered(source, ms=roles) == '0User- é=[\n 1\n]; 15 April 2025 2 4 {"é": "<"}'


GROW = "{% set ns = namespace(x=START) %}{% for i in range(200) %}{% set ns.x = STEP %}{% endfor %}"
KEEP = (
    "{% set b = 'x' * 9999 %}{% set c = dict(PAIRS.split()) %}{% set ns = namespace() %}"
    "{% for i in range(9999) %}{% set ns.x = namespace(p=ns.x, v=VALUE) %}{% endfor %}"
).replace("PAIRS", repr(" ".join(letter + "0" for letter in string.ascii_letters)))
MANY = "{% set b = ['x' * 9999] * 9999 %}"
UNBOUNDED = {
    "nested loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for i in range(100000) %}{% for j in range(100000) if false %}{% endfor %}{% endfor %}",
    "macro calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "loop calls itself": "{% for i in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "doubling by +": GROW.replace("START", "'a'").replace("STEP", "ns.x + ns.x"),
    "doubling by ~": GROW.replace("START", "'a'").replace("STEP", "ns.x ~ ns.x"),
    "doubling by replace": GROW.replace("START", "'a'").replace("STEP", "ns.x.replace('a', 'aa')"),
    "doubling by the filter": GROW.replace("START", "'a'").replace("STEP", "ns.x | replace('a', 'aa')"),
    "doubling by join": GROW.replace("START", "'a'").replace("STEP", "ns.x.join(['', '', ''])  ~ ns.x"),
    "doubling a list": GROW.replace("START", "[1]").replace("STEP", "ns.x + ns.x"),
    "a list twice in a list": GROW.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]"),
    "a list a thousand times": GROW.replace("START", "[1]").replace("STEP", "[ns.x * 1000]"),
    "a dict twice in a dict": GROW.replace("START", "{}").replace("STEP", "dict(a=ns.x, b=ns.x)"),
    "depth": GROW.replace("START", "[1]").replace("STEP", "[ns.x]"),
    "squares": GROW.replace("START", "3").replace("STEP", "ns.x * ns.x"),
    "power": "{{ 2 ** (10 ** 9) }}",
    "repeated text": "{{ 'x' * 10 ** 9 }}",
    "repeated list": "{{ (10 ** 9 * [0]) | length }}",
    "range": "{{ range(10 ** 9) | list }}",
    "width by %": "{{ '%1000000000d' % 1 }}",
    "width by format": "{{ '{:1000000000}'.format(1) }}",
    "width by method": "{{ 'x'.center(10 ** 9) }}",
    "width of an indent": "{{ 'x\ny' | indent(10 ** 9) }}",
    "width in tojson": "{{ [1] | tojson(indent=10 ** 9) }}",
    "width of a date": "{{ strftime_now('%Y' * 1000) }}",
    "big texts in a map": "{% set b = 'x' * 1000000 %}{{ ([b] * 100000) | map('upper') | list }}",
    "output": "{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}",
    "kept slices": KEEP.replace("VALUE", "b[1:]"),
    "kept pieces of a split": KEEP.replace("VALUE", "b.split('y')"),
    "kept pieces of a partition": KEEP.replace("VALUE", "b.partition('y')"),
    "kept copies of a dict": KEEP.replace("p=ns.x, v=VALUE", "before=ns.x, **c"),
    "a long list of one text by *": MANY,
    "a long list of one text by +": "{% set ns = namespace(x=['x' * 1000]) %}"
    "{% for i in range(12) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a long list of one text by map": "{{ range(9999) | map(attribute='a', default='x' * 1000) | list | length }}",
    "a long list of one list by map": "{% set b = ['x' * 1000] %}{{ (['a'.z] * 999) | map('default', b) | list }}",
    "a long list of one list by int": "{% set b = ['x' * 1000] %}{{ ('a' * 999) | list | map('int', b) | list }}",
    "digits": "{{ ('f' * 100000) | int(0, 16) // 3 }}",
    "one list printed often": "{% set b = ['x' * 1000] * 1000 %}{% for i in range(1000) %}{{ b }}{% endfor %}",
}


@pytest.mark.parametrize("source", UNBOUNDED.values(), ids=UNBOUNDED.keys())
def test_work_is_bounded_by_counts(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MAX_STEPS", 100_000), ("FREE_CHARACTERS", 1 << 19), ("MAX_SECONDS", 60.0)):
        monkeypatch.setattr(render, name, value)
    with pytest.raises(RefusedError) as refused:
        rendered(source)
    assert "\n" not in str(refused.value)
    assert "seconds" not in str(refused.value)


def test_an_indent_at_every_depth_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, spend = [0], render._Environment._spend

    def recorded(self: render._Environment, value: object) -> object:
        lengths.append(len(value) if isinstance(value, str) else 0)
        return spend(self, value)

    monkeypatch.setattr(render, "FREE_CHARACTERS", 1 << 19)
    monkeypatch.setattr(render._Environment, "_spend", recorded)
    deep = "{% set ns = namespace(x=[0] * 4000) %}{% for i in range(60) %}{% set ns.x = [ns.x] %}{% endfor %}"
    with pytest.raises(RefusedError, match="makes more than"):
        rendered(deep + "{{ ns.x | tojson(indent=16) }}")
    assert max(lengths) < 2000


def test_the_clock_stands_behind_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "MAX_SECONDS", 0.0)
    with pytest.raises(RefusedError, match="takes more than 0 seconds"):
        rendered("{% for i in range(9) %}{% endfor %}")


def test_a_long_conversation_is_no_breach() -> None:
    source = "{% for m in ms %}{{ '<' ~ m.content.replace('a', 'b').strip() | trim ~ '>' }}{% endfor %}"
    messages = [{"content": f" {i} " + "ab" * 500} for i in range(1000)]
    assert rendered(source, ms=messages).count("<") == 1000
    with pytest.raises(MessagesError, match="more than 16777216 characters"):
        rendered(source, ms=["a" * (1 << 24)])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "Expected an expression.* in line 1"),
        ("{{ 'a' | pprint }}", "uses the filter 'pprint' in line 1; known are abs, "),
        ("{{ 'a' is filter }}", "uses the test 'filter'"),
        ("{% include 'a' %}", "uses a statement of the kind Include"),
        ("{% import 'a' as b %}", "kind Import"),
        ("{% extends 'a' %}", "kind Extends"),
        ("{% autoescape true %}{% endautoescape %}", "kind Scope"),
        ("{{ 1e999 }}", "writes a number beyond floats in line 1"),
        ("{{ " + "9" * 5000 + " }}", "Exceeds the limit"),
        ("{% block a %}{% endblock %}", "kind Block"),
        ("{% macro f() %}{{ varargs }}{% endmacro %}", "uses varargs in line 1"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "nests expressions too deeply|too many"),
    ],
)
def test_what_no_template_needs_is_refused_before_it_runs(source: str, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        Program(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ messages[0].pop('a') }}",
        "{{ 'a'.encode() }}",
        "{{ 'a'.marks.hex() }}",
        "{{ 'a'.with_mark(1) }}",
        "{{ namespace().__init__() }}",
        "{{ raise_exception.__globals__['x'] }}",
        "{{ namespace() }}",
        "{{ [range] }}",
        "{{ self.x() }}",
    ],
)
def test_nothing_else_can_be_reached(source: str) -> None:
    messages = [{"a": 1}]
    with pytest.raises((RefusedError, MessagesError)):
        rendered(source, messages=messages)
    assert messages == [{"a": 1}]


def test_a_refusal_in_the_templates_own_words_is_about_the_messages() -> None:
    with pytest.raises(MessagesError, match=r"^roles must alternate$"):
        rendered("{{ raise_exception('roles must\nalternate') }}")
    for source in ("{{ a.b.c }}", "{{ 1 / 0 }}", "{{ a + 1 }}", "{{ 'a' + 1 }}", "{{ {}['a']['b'] }}"):
        with pytest.raises(MessagesError):
            rendered(source)


def test_reads_names_the_variables() -> None:
    program = Program(
        "{% set on = on if on is defined else true %}{{ messages }}{{ range(3) }}{% for a in b %}{{ a }}{% endfor %}"
    )
    assert program.reads == {"messages", "on", "b"}


def test_a_source_without_end_is_not_parsed() -> None:
    with pytest.raises(RefusedError, match=r"^has 262,145 characters; at most 262,144$"):
        Program("a" * (2**18 + 1))
