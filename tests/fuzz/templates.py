"""Chat templates as models have them, and what a hostile one would say."""

from __future__ import annotations

import re
from random import Random

from tests.fuzz import values

TEMPLATES = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' "
    "+ message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "{{- bos_token }}{%- if not date is defined %}{%- set date = strftime_now('%d %b %Y') %}{%- endif %}{{- 'Today: ' + date }}"
    "{%- if tools is not none %}{%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}{%- endif %}"
    "{%- for message in messages %}{{- message.role ~ ':' ~ (message['content'] | trim) }}{%- endfor %}",
    "{% set ns = namespace(last=messages|length - 1) %}{% macro show(m) %}{{ m.role }}: {{ m.content }}{% endmacro %}"
    "{% for message in messages %}{% if loop.index0 > 100 %}{% break %}{% endif %}"
    "{% generation %}{{ show(message) }}{% endgeneration %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no') }}{% endif %}{% endfor %}",
)

HOSTILE = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i * j %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
    "{{ range(1000000000) | list }}", "{{ 'a' * 1000000000000 }}", "{{ [0] * 1000000000000 }}", "{{ 9 ** 9 ** 9 ** 9 }}",
    "{{ '%1000000000d' % 1 }}", "{{ '{:>1000000000}'.format(1) }}", "{{ '{:>{}}'.format(1, 1000000000) }}",
    "{{ 'a' | center(1000000000) }}", "{{ 'a'.center(1000000000) }}", "{{ 'a\\na' | indent(1000000000) }}",
    "{{ 'a'.zfill(1000000000) }}", "{{ 'a\\tb'.expandtabs(1000000000) }}", "{{ '%s' | format('a' * 1000000000) }}",
    "{{ ('a' * 100000).replace('a', 'b' * 100000) }}", "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "{{ ('a' * 100000).join('b' * 100000) }}", "{{ (range(90000) | list) | join('b' * 100000) }}",
    "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}", "{{ lipsum(100000) }}", "{{ messages | tojson(indent=100000000) }}",
    "{% set ns = namespace(x='aa') %}{% for i in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x | length }}",
    "{% set ns = namespace(x='aa') %}{% for i in range(64) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}",
    "{% set ns = namespace(x=[0]) %}{% for i in range(64) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}",
    "{% set ns = namespace(x=[1, 2]) %}{% for i in range(64) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=9) %}{% for i in range(64) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for x in [[1]] recursive %}{{ loop(x) }}{{ loop([[1]]) }}{% endfor %}",
    "{% set x %}{% for i in range(99999) %}{{ messages[0].content * 1000 }}{% endfor %}{% endset %}{{ x | length }}",
    "{{ range(99999) | map('string') | map('center', 99999) | join | length }}",
    "{{ range(9999) | map('center', 9999) | list | length }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ namespace.__init__.__globals__ }}", "{{ self.__init__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id') }}", "{{ messages.__class__ }}", "{{ (messages | attr('__class__')) }}",
    "{{ '\\ud800' }}", "{{ strftime_now('%' * 1000) }}", "{{ strftime_now('\\ud800%Y') }}", "{% include 'x' %}",
    "{% extends messages %}",
    "{% import 'a' as b %}", "{% from 'a' import b %}", "{{ undefined.x.y }}", "{{ messages[10**30] }}", "{{ 1 / 0 }}",
    "{{ caller() }}", "{{ loop }}", "{{ joiner() }}", "{% raw %}", "{% set loop = 1 %}", "{{ dict(a=1) | dictsort }}",
    "{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaa!' | urlize }}", "{{ ['a'] | map(attribute='__class__') | list }}",
    "{{ [3,1] | sort | first }}",
    "{% filter upper %}{{ 'a' * 3 }}{% endfilter %}", "{{ 5 | round(1000000000) }}", "{{ 'x' | wordwrap(0) }}",
    "{{ [1, 2] | batch(0) | list }}",
    "{{ [1] | batch(1000000000, 0) | list }}", "{{ [1] | slice(1000000000) | list }}", "{{ 'a' | int(0, 99) }}",
    "{{ '1' * 5000 | int }}",
)  # fmt: skip
_TOKENS = ("messages", "loop", "range(9)", "'a'", "99999", "none", "|", "~", "*", "**", "not", "tools", "(", ".")
_TOKEN = re.compile(r"\{[%{#]-?|-?[%}#]\}|\w+|\s+|.", re.DOTALL)


def mutated_template(random: Random, source: str) -> str:
    """The template with tokens lost, doubled, swapped or from elsewhere; often with a hostile piece."""
    kind = random.random()
    if kind < 0.25:
        return random.choice((source + random.choice(HOSTILE), random.choice(HOSTILE) + source, random.choice(HOSTILE)))
    if kind < 0.28:
        depth = random.choice((50, 200, 5000))
        nested = "{% if x %}" * depth + "{% endif %}" * depth
        return random.choice(("{{ " + "(" * depth + "1" + ")" * depth + " }}", nested, "{{" * depth))
    tokens: list[str] = _TOKEN.findall(source)
    for _ in range(random.choice((1, 1, 2, 5))):
        at, other = random.randrange(len(tokens)), random.randrange(len(tokens))
        kind = random.randrange(6)
        if kind == 0 and len(tokens) > 1:
            del tokens[at]
        elif kind == 1:
            tokens[at], tokens[other] = tokens[other], tokens[at]
        elif kind == 2:
            tokens.insert(at, tokens[other])
        elif kind == 3:
            tokens[at] = random.choice(_TOKENS)
        elif kind == 4:
            tokens.insert(at, random.choice(_TOKEN.findall(random.choice(HOSTILE))))
        else:
            tokens[at] = values.text(random)[:300]
    return "".join(tokens)
