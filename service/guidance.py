"""How llguidance is asked. One place for the router, which compiles each grammar before it accepts a request, and the worker, which
follows it: same library, same limits, same tokenizer, so the same answer.

What a grammar can't be held to is refused, never approximated: unknown JSON schema keywords, `oneOf` whose branches overlap.
"""

from __future__ import annotations

import json
import re
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark

from service.grammar import Grammar, GrammarError

_MAX_PROBLEM_CHARACTERS = 500
# JSON may have white space anywhere, and a model that has begun with it may never stop. Enough for what people and programs write: a
# few blanks, or one line's end and an indentation.
_WHITESPACE = r"(\x20{1,4}|\r?\n[\x20\t]{0,40})"

_PLACE = re.compile(r"(?:at )?(\d+)\((\d+)\): ")  # line and column
_SHOWN = re.compile(r" *\d+ \| .*|[ ^]*")
_WHY = "error: "


def load_tokenizer(tokenizer_json: bytes, vocab_size: int, eos_token_ids: tuple[int, ...]) -> LLTokenizer:
    """llguidance's view of a tokenizer. Holds Python's lock for its whole time, half a second for 49,152 tokens: not for a process
    that serves. Raises GrammarError.
    """
    if not eos_token_ids:
        raise GrammarError("the model has no end-of-sequence token, so an output could not end where its grammar does")
    try:
        return LLTokenizer(tokenizer_json.decode(), n_vocab=vocab_size, eos_token=list(eos_token_ids))
    except BaseException as error:
        if not _is_llguidance_error(error):
            raise
        raise GrammarError(
            f"the model's tokenizer is none that grammars can be compiled for: {_short(error)}"
        ) from None


def compile_grammar(grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher at the grammar's beginning. Most of the time is spent without Python's lock. Raises GrammarError."""
    try:
        matcher = LLMatcher(tokenizer, _to_llguidance(grammar), log_level=0, limits=_limits())
        problem = matcher.get_error()
    except BaseException as error:
        if not _is_llguidance_error(error):
            raise
        problem = str(error) or type(error).__name__
    if problem:
        raise GrammarError(_reason(problem, grammar.kind))
    return matcher


def _to_llguidance(grammar: Grammar) -> str:
    held, *others = _of_kind(grammar)
    if not grammar.closing:
        return json.dumps({"grammars": [held, *others]})
    # Anything up to the first closing mark, white space, and then what is held to the grammar.
    thought = f"{_quoted(grammar.opening)} thought" if grammar.opening else "thought"
    start = f"(space {thought} space)? @held" if grammar.opening else f"{thought} space @held"
    lark = f"start: {start}\nspace: /\\s{{0,4}}/\nthought[lazy]: /(?s:.*)/ {_quoted(grammar.closing)}\n"
    return json.dumps({"grammars": [{"lark_grammar": lark}, held | {"name": "held"}, *others]})


def _calls_in_lark(calls: dict[str, Any]) -> str:
    """Text that is free ends where a call begins, and after calls comes nothing else."""
    rules, names = [], []
    opening = calls["opening"]
    mark = opening.strip()
    for index, (name, schema) in enumerate(calls["functions"]):
        names.append(f"call_{index}")
        begins = f'{{"name": {json.dumps(name)}, {json.dumps(calls["arguments"])}: '
        rules.append(f"call_{index}: {_quoted(begins)} arguments_{index} {_quoted('}' + calls['closing'])}")
        rules.append(f"arguments_{index}: %json {_schema_of_arguments(name, schema)}")
    rules.append("call: " + " | ".join(names))
    further = f"{{0,{calls['most'] - 1}}}"
    one = f"{_quoted(opening)} call" if opening else "call"
    between = f"{_quoted(calls['separator'])} {one}" if calls["separator"] else one
    several = f"{one} ({between}){further}" if calls["most"] > 1 else one
    if not calls["free"]:
        # The first character tells the two apart: where both began with a brace, the lexer would take the longest token that it knows
        # of either, and JSON that begins as a call does would be lost.
        rules.append(f"start: {several} | @instead" if "or_json_schema" in calls else f"start: {several}")
    elif mark:
        space = _quoted(opening[opening.index(mark) + len(mark) :])
        further_calls = f" ({between}){further}" if calls["most"] > 1 else ""
        rules.append(f"start: TEXT | head {space} call{further_calls}")
        rules.append(f"head[lazy]: TEXT {_quoted(mark)}")
        rules.append("TEXT: /(?s:.*)/")
    else:
        rules.append(f"start: {several} | TEXT?")
        rules.append(r"TEXT: /[^\s\{](?s:.*)/")
    return "\n".join(rules) + "\n"


def _schema_of_arguments(name: str, text: str) -> str:
    try:
        schema = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"function {name}: no JSON: {_short(error)}") from None
    kind = schema.get("type", "object") if isinstance(schema, dict) else None
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise GrammarError(f"function {name}: its parameters must be the schema of an object")
    try:
        _refuse_what_is_compiled_wrongly(schema)
    except GrammarError as error:
        raise GrammarError(f"function {name}: {error}") from None
    guidance = {"whitespace_pattern": _WHITESPACE, "lenient": False, "coerce_one_of": False}
    return json.dumps(schema | {"type": "object", "x-guidance": guidance})


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _of_kind(grammar: Grammar) -> list[dict[str, Any]]:
    """The grammar, and those that it names."""
    if grammar.kind == "calls":
        calls = json.loads(grammar.text)
        instead = calls.get("or_json_schema")
        others = [] if instead is None else [_of_schema(instead) | {"name": "instead"}]
        return [{"lark_grammar": _calls_in_lark(calls)}, *others]
    if grammar.kind == "regex":
        return [{"lark_grammar": f"start: /{regex_to_lark(grammar.text, 'd')}/"}]
    if grammar.kind == "lark":
        return [{"lark_grammar": grammar.text}]
    if grammar.kind == "choice":
        quoted = (json.dumps(value, ensure_ascii=False) for value in json.loads(grammar.text))
        return [{"lark_grammar": "start: " + " | ".join(quoted)}]
    return [_of_schema(grammar.text)]


def _of_schema(text: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"no JSON: {_short(error)}") from None
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise GrammarError("must be an object, or true" if schema is not False else "no output satisfies it")
    _refuse_what_is_compiled_wrongly(schema)
    # A schema may choose its own white space ("x-guidance"), but not that what can't be held to is left out.
    compiled = LLMatcher.grammar_from_json_schema(
        json.dumps(schema),
        defaults={"whitespace_pattern": _WHITESPACE},
        overrides={"lenient": False, "coerce_one_of": False},
    )
    (held,) = json.loads(compiled)["grammars"]
    return dict(held)


def _refuse_what_is_compiled_wrongly(schema: dict[str, object]) -> None:
    """llguidance 1.9.1 lets a number be its excluded bound where that is whole and the other bound is less than 1 away: the digits
    before the point alone are then taken for a number inside. Integers are right. Bounds in two parts of an allOf are not seen here.
    Near the smallest number of 64 bits it recurses until the stack is used up.
    """
    parts: list[object] = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        if isinstance(part, int | float) and -1e19 < part < -(2**62):
            raise GrammarError(f"the number {part:g} is not supported")
        if not isinstance(part, dict):
            continue
        parts += part.values()
        low, high = (_bounds(part, name) for name in ("inimum", "aximum"))
        for excluded, other in ((low[0], high), (high[0], low)):
            near = [
                bound for bound in other if bound is not None and excluded is not None and abs(bound - excluded) < 1
            ]
            if excluded is not None and excluded == int(excluded) and near and part.get("type") != "integer":
                raise GrammarError(
                    f"a range of numbers that excludes {excluded:g} and ends at {near[0]:g} is not supported"
                )


def _bounds(part: dict[str, object], name: str) -> tuple[float | None, float | None]:
    """The excluded and the included bound of a schema, if they are numbers."""
    return _number(part.get(f"exclusiveM{name}")), _number(part.get(f"m{name}"))


def _number(value: object) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(
        value, bool
    )  # in draft 4 exclusiveMinimum is true or false
    return float(value) if isinstance(value, int | float) and is_number and abs(value) < 1e15 else None


def _limits() -> LLParserLimits:
    """Half of llguidance's own fuel for a mask (about 7 ms), a fifth of its states (2 kB each)."""
    return LLParserLimits(
        step_lexer_fuel=100_000,
        step_max_items=25_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def _is_llguidance_error(error: BaseException) -> bool:
    """ValueError and its like for what it refuses; its panics are no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _reason(problem: str, kind: str) -> str:
    """What llguidance says is wrong, in one line: without the lines of grammar that it shows, with carets under them. Where it is in
    them is told where the client wrote that grammar.
    """
    lines = [line for line in problem.splitlines() if not _SHOWN.fullmatch(line)]
    found = _PLACE.match(lines[0]) if lines else None
    where = ""
    if found is not None:
        lines[0] = lines[0][found.end() :]
        where = f"line {found[1]}, column {found[2]}: " if kind == "lark" else ""
    # Of a regular expression, which is shown once more above it.
    why = next((line.removeprefix(_WHY) for line in lines if line.startswith(_WHY)), "")
    if why:
        return _short(f"{where}invalid regex: {why}")
    _, inside, rest = " ".join(lines).partition("(in regex): ")
    return _short(where + (f"invalid regex: {rest}" if inside else " ".join(lines)))


def _short(problem: object) -> str:
    text = " ".join(str(problem).split())
    return text if len(text) <= _MAX_PROBLEM_CHARACTERS else text[:_MAX_PROBLEM_CHARACTERS] + "…"
