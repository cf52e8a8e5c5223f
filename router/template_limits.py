"""What a chat template may use up. It comes with a model, so it is a program from elsewhere, and it runs for every conversation.

Jinja's sandbox keeps a template from Python's insides but bounds neither time nor memory. Here the tree of a template is changed
before it is compiled, so that each iteration, call and comparison is charged to a budget, and what would make one huge value
is refused before it is made. Nothing is folded at compile time: that would be work that nobody counts.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

_MAX_STEPS = 6_000_000  # of about a quarter of a microsecond
_MAX_CHARACTERS = 16 << 20  # of one value, and of all output together
_MAX_NUMBER = 100_000  # widths, counts, precisions
_MAX_BITS = 1 << 16  # of an integer
_CALL = 24  # steps of a call or a filter
_TICK = 8  # of an iteration
_CHARACTERS_A_STEP = 16
_SHALLOW = frozenset(
    ("attr", "batch", "count", "d", "default", "first", "items", "last", "length", "list", "map", "random", "reject")
).union(("rejectattr", "reverse", "select", "selectattr", "slice"))
_ANY_NUMBER = frozenset(("attr", "d", "default", "float", "int", "sum"))
_COMPARING = frozenset(
    ("!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le", "lessthan", "lt", "ne")
)
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(\*|\d{6})")


class TooMuch(Exception):
    """The template would use up more than it may."""


class _Budget:
    __slots__ = ("characters", "steps")

    def __init__(self) -> None:
        self.steps = _MAX_STEPS
        self.characters = _MAX_CHARACTERS


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Render its templates inside `budget()`; then TooMuch is raised in time."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(optimized=False, finalize=_finalize, **options)
        self._budget: ContextVar[_Budget] = ContextVar("budget")
        del self.globals["lipsum"]
        for name, function in list(self.filters.items()):
            self.filters[name] = self.bounded(name, function)
        for name in _COMPARING & self.tests.keys():
            self.tests[name] = self._weighing(self.tests[name])  # type: ignore[arg-type]  # jinja2 leaves it untyped

    @contextmanager
    def budget(self) -> Iterator[None]:
        """For one rendering; each thread has its own."""
        token = self._budget.set(_Budget())
        try:
            yield
        finally:
            self._budget.reset(token)

    # ---- charged by the changed tree

    def tick(self, characters: int) -> None:
        """One iteration or call of a body that holds so much literal text."""
        self._charge(_TICK)
        self._write(characters)

    def weighed(self, value: Any) -> Any:
        """Charge for all that hangs on a value; it comes back as it is."""
        stack = [value]
        while stack:
            one = stack.pop()
            if isinstance(one, str):
                self._charge(1 + len(one) // _CHARACTERS_A_STEP)
            elif isinstance(one, list | tuple | set | frozenset):
                self._charge(1 + len(one))
                stack.extend(one)
            elif isinstance(one, dict):
                self._charge(1 + len(one))
                stack.extend(one)
                stack.extend(one.values())
            else:
                self._charge(1)
        return value

    def concatenated(self, *values: Any) -> str:
        """The operator ~."""
        parts = [str(self.weighed(value)) for value in values]
        self._size(sum(map(len, parts)))
        return "".join(parts)

    def written(self, value: Any) -> Any:
        """A value on its way into the output."""
        self.weighed(value)
        if isinstance(value, str):
            self._write(len(value))
        return value

    # ---- jinja's hooks

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Charging().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        assert isinstance(tree, nodes.Template)
        return tree

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if owner is __self:  # of the changed tree
            return __obj(*args)
        __self._charge(_CALL)
        if isinstance(owner, str):
            given = {key: value for key, value in kwargs.items() if key not in ("_loop_vars", "_block_vars")}
            args = __self._check_method(owner, __obj.__name__, args, given)
        elif isinstance(owner, list | tuple):
            __self.weighed([owner, args])  # count and index compare
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str | list | tuple):
            __self._size(len(result))
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self._charge(_TICK)
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            self._size(len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            self._check_percent(left, right)
        elif operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(other, int):
                    self._size(len(one) * max(0, other))
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * right
            if bits > _MAX_BITS:
                raise TooMuch("a number is too large")
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        inner = super().wrap_str_format(value)
        if inner is None:
            return None
        found = inner

        def bounded(*args: Any, **kwargs: Any) -> str:
            if value.__name__ == "format_map":
                raise TooMuch("format_map is not available")
            for _, _, spec, _ in string.Formatter().parse(value.__self__):
                if spec and ("{" in spec or any(int(n) > _MAX_NUMBER for n in re.findall(r"[0-9]{1,9}", spec))):
                    raise TooMuch(f"the width in the format {spec[:20]!r}")
            self.weighed([args, kwargs])
            return found(*args, **kwargs)

        return bounded

    def bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that is charged, and refused what would make it write without end."""
        first = int(hasattr(function, "jinja_pass_arg"))

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._charge(_CALL)
            value, more = args[first], (*args[first + 1 :], *kwargs.values())
            if name == "join" and not isinstance(value, str | list | tuple | dict):
                value = list(value)
                args = (*args[:first], value, *args[first + 1 :])
            self._check_filter(name, value, more)
            result = function(*args, **kwargs)
            if isinstance(result, str | list | tuple):
                self._size(len(result))
            return self._counted(result) if isinstance(result, Iterator) else result

        return run

    # ---- inside

    def _charge(self, steps: int) -> None:
        budget = self._budget.get()
        budget.steps -= steps
        if budget.steps < 0:
            raise TooMuch("it takes too many steps")

    def _write(self, characters: int) -> None:
        budget = self._budget.get()
        budget.characters -= characters
        if budget.characters < 0:
            raise TooMuch(f"it writes more than {_MAX_CHARACTERS} characters")

    def _size(self, length: int) -> None:
        """Of a value that is about to be made, or was made within known bounds."""
        if length > _MAX_CHARACTERS:
            raise TooMuch("a value is too large")
        self._charge(length // _CHARACTERS_A_STEP)

    def _counted(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self._charge(_TICK)
            yield item

    def _weighing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any) -> Any:
            self.weighed(args)
            return function(*args)

        return run

    def _check_method(self, owner: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        if name in ("translate", "maketrans"):
            raise TooMuch(f"{name} is not available")
        self._charge(len(owner) // _CHARACTERS_A_STEP)
        self._check_numbers((*args, *kwargs.values()))
        if name == "replace" and len(args) >= 2:
            self._check_growth(owner, args[0], args[1])
        if name == "expandtabs":
            width = int(next(iter((*args, *kwargs.values())), 8))
            self._size(len(owner) + owner.count("\t") * max(0, width))
        if name == "join" and args and not isinstance(args[0], str):
            args = (list(args[0]),)
            self.weighed(args[0])
            self._size(sum(len(item) + len(owner) for item in args[0] if isinstance(item, str)))
        elif name == "join" and args:
            self._size(len(args[0]) * (1 + len(owner)))
        return args

    def _check_filter(self, name: str, value: Any, more: tuple[Any, ...]) -> None:
        if name not in _SHALLOW:
            self.weighed([value, more])
        elif hasattr(value, "__len__"):
            self._charge(len(value) // _CHARACTERS_A_STEP)
        if name not in _ANY_NUMBER:
            self._check_numbers(more)
        if name == "replace" and len(more) >= 2:
            self._check_growth(str(value), more[0], more[1])
        elif name == "format":
            self._check_percent(str(value), more)
        elif name == "join":
            separator = len(more[0]) if more and isinstance(more[0], str) else 0
            self._size(sum(separator + (len(item) if isinstance(item, str) else 0) for item in value))
        elif name == "indent":
            width = len(more[0]) if more and isinstance(more[0], str) else more[0] if more else 4
            self._size(len(str(value)) + (1 + str(value).count("\n")) * width)
        elif name == "wordwrap" and any(isinstance(one, str) and len(one) > 8 for one in more):
            raise TooMuch("a long wrapstring")
        elif name == "tojson" and any(isinstance(one, int) and one > 64 for one in more):
            raise TooMuch("a wide indent")

    def _check_numbers(self, values: tuple[Any, ...]) -> None:
        if any(isinstance(value, int) and abs(value) > _MAX_NUMBER for value in values):
            raise TooMuch(f"a number above {_MAX_NUMBER}")

    def _check_growth(self, text: str, old: Any, new: Any) -> None:
        self._size(len(text) + text.count(str(old)) * len(str(new)))

    def _check_percent(self, text: str, values: Any) -> None:
        if _WIDE_PERCENT.search(text):
            raise TooMuch("the width in a format")
        self.weighed([text, values])


@jinja2.pass_context  # so that jinja does not fold it
def _finalize(context: Context, value: Any) -> Any:
    environment = context.environment
    assert isinstance(environment, BoundedEnvironment)
    return environment.written(value)


class _Charging(NodeTransformer):
    """Puts the charges into a template's tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._ticking(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._ticking(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._ticking(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("concatenated", node.nodes, node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _weighed(node.expr)
        for operand in node.ops:
            operand.expr = _weighed(operand.expr)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _weighed(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _weighed(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _weighed(node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):  # copies
            node.node = _weighed(node.node)
        return node

    def _ticking(self, node: Any) -> nodes.Node:
        characters = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("tick", [nodes.Const(characters)], node)).set_lineno(node.lineno))
        return node  # type: ignore[no-any-return]


def _weighed(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _call("weighed", [node], node)


def _call(name: str, arguments: list[Any], at: nodes.Node) -> nodes.Expr:
    call = nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)
    call.set_lineno(at.lineno)
    return call
