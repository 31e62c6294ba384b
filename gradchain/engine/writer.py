"""Write the code of a program, call after call, in the fastest form of each operation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch

from gradchain._norms import is_long
from gradchain.engine.table import (
    COMMUTATIVE,
    FOREACH,
    NAMES,
    NUMBERS,
    NUMBERS_ARE_SLOW,
    RENAMED,
    TAKES_NUMBERS,
    TAKES_SCALARS,
    VIEWS,
    WORTH_A_RECIPROCAL,
)
from gradchain.engine.trace import DEVICE, TENSOR, Call, Ref, Trace
from gradchain.engine.values import Kind, Values

Argument: TypeAlias = tuple[str, Kind]
"""The expression of an argument, and what it stands for."""


def _argument_of(index: int, place: int | str, trace: Trace) -> Any:
    """Return an argument of a call, by its position or by its keyword."""
    call = trace.calls[index]
    return call.args[place] if isinstance(place, int) else call.kwargs[place]


def _is_long_norm(trace: Trace, index: int) -> bool:
    call = trace.calls[index]
    shape = trace.forms[call.args[0].number][0]
    ord, dims = (*call.args[1:], 2.0, None)[:2] if len(call.args) == 1 else (*call.args[1:], None)[:2]
    size = math.prod(shape[d] for d in (range(len(shape)) if dims is None else dims))
    return isinstance(ord, int | float) and is_long(size, float(ord))


def _looped(expression: str, loop: Sequence[tuple[str, str]]) -> str:
    """Return the code of a list of ``expression`` over ``loop``, pairs of a variable and the list that it goes over."""
    variables, lists = zip(*loop, strict=True)
    over = lists[0] if len(lists) == 1 else f"zip({', '.join(lists)})"
    return f"[{expression} for {', '.join(variables)} in {over}]"


class Writer(Values):
    """Writes the lines of a program, call after call."""

    def __init__(self, traces: Sequence[Trace], device: torch.device, *, single: bool) -> None:
        self.functions = SimpleNamespace()
        self.globals: dict[str, Any] = {**NAMES, "aten": self.functions, "device": device}
        super().__init__(traces[0], {*self.globals, "complex", "len", "max", "min", "zip"}, single=single)
        self.traces = traces
        self.lines: list[str] = []
        self.differing: list[Callable[[Trace], Any]] = []
        self.parameters = list(self.names.values())
        small = [call for call in self.trace.calls if call.is_pointwise and self._shape(call.results[0]) == ()]
        self.stacks = not single and len(small) > 2
        """Whether to stack values that are a number for each tensor, since several operations on them follow."""
        self.numbers: set[int] = set()
        """The values that are plain Python numbers in the traces, one for all tensors or one for each."""

    def write(self) -> tuple[str, Callable[..., None]]:
        """Return the source of the program, and its function."""
        stage = ""
        for index, call in enumerate(self.trace.calls):
            if call.stage != stage:
                stage = call.stage
                self.lines.append(f"# {stage}")
            self._write_call(index, call)
            self._write_results(index)
        self._write_results(len(self.trace.calls))
        if self.unwritten:  # a circle, such as two tensors that change places
            before = {value: f"{self.names[value]}_before" for value in self.unwritten.values()}
            self.lines += [f"{text} = {self._clone(self.names[value])}" for value, text in before.items()]
            for home, value in self.unwritten.items():
                self._copy(self.names[home], before[value], Kind.EACH)
        parameters = [*self.parameters, *(f"c{i}" for i in range(len(self.differing)))]
        code = [line for line in self.lines if not line.startswith("#")]
        body = "\n    ".join(self.lines if code else [*self.lines, "pass"])
        source = f"def program({', '.join(parameters)}):\n    {body}\n"
        exec(source, self.globals)
        return source, self.globals["program"]

    # Arguments

    def _argument(self, find: Callable[[Trace], Any]) -> Argument:
        """Return the expression of an argument, and its kind."""
        leaf = find(self.trace)
        if isinstance(leaf, Ref):
            return self.names[leaf.number], self.kinds[leaf.number]
        if isinstance(leaf, tuple) and any(isinstance(each, Ref) for each in leaf):
            return self._tensors(leaf)
        if any(find(trace) != leaf for trace in self.traces):
            self.differing.append(find)
            return f"c{len(self.differing) - 1}", Kind.EACH
        return self._literal(leaf), Kind.NUMBER

    def _tensors(self, leaves: Sequence[Any]) -> Argument:
        """Return the expression of several tensors that are one argument, such as those of ``torch.cat``."""
        texts, loop, kinds = list[str](), list[tuple[str, str]](), [Kind.SHARED]
        for position, leaf in enumerate(leaves):
            is_value = isinstance(leaf, Ref)
            text = self.names[leaf.number] if is_value else self._literal(leaf)
            kinds.append(self.kinds[leaf.number] if is_value else Kind.SHARED)
            if kinds[-1] is Kind.NUMBER:
                text = self._new_tensor(text, leaf.number)
            texts.append(self._in_loop(text, kinds[-1], f"w{position}", loop))
        expression = f"[{', '.join(texts)}]"
        return (_looped(expression, loop), Kind.EACH) if loop else (expression, max(kinds))

    def _literal(self, value: Any) -> str:
        if value is DEVICE:
            return "device"
        if value is None or isinstance(value, int | float | str):
            return repr(value)
        if isinstance(value, complex):
            return f"complex({value.real!r}, {value.imag!r})"
        if isinstance(value, tuple):
            return f"[{', '.join(map(self._literal, value))}]"
        if str(value).startswith("torch."):  # a dtype, a layout or a memory format
            return str(value)
        raise AssertionError(f"no literal for {value!r}")

    # One call

    def _write_call(self, index: int, call: Call) -> None:
        result = call.results[0]
        name = RENAMED.get(call.name, call.name)
        arguments = [self._argument(partial(_argument_of, index, i)) for i in range(len(call.args))]
        options = {key: self._argument(partial(_argument_of, index, key)) for key in call.kwargs}
        kind = max([k for _, k in (*arguments, *options.values())], default=Kind.NUMBER)
        self.memory[result] = result
        if call.name in VIEWS and kind >= Kind.SHARED:
            self.memory[result] = self.memory[call.args[0].number]
        leaf = call.args[0] if call.args else None
        if call.name == "_to_copy" and not (isinstance(leaf, Ref) and leaf.number not in self.numbers):
            self.names[result], self.kinds[result] = arguments[0]  # a plain number, or one for each tensor
            self.numbers.add(result)
        elif kind is Kind.NUMBER and call.name in NUMBERS:
            self.kinds[result] = Kind.NUMBER
            texts = (text if text.isidentifier() or text[0].isdigit() else f"({text})" for text, _ in arguments)
            is_flag = isinstance(leaf, Ref) and self.trace.forms[leaf.number][1] is torch.bool
            # torch.compile knows no arithmetic of flags that depend on a number, nor float() of them.
            form = "1 if {0} else 0" if call.name == "_to_copy" and is_flag else NUMBERS[call.name]
            self.names[result] = form.format(*texts)
        elif kind is Kind.STACK and not (call.is_pointwise and len(call.results) == 1):
            self._write_generic(index, call, name, arguments, options, Kind.EACH)
        elif kind is not Kind.EACH or self.single:
            self._write_single(index, call, name, arguments, options, max(kind, Kind.SHARED))
        else:
            self._write_list(index, call, name, arguments, options)

    def _use_reciprocal(self, call: Call, name: str, texts: list[str], kind: Kind) -> str:
        """Make a quotient a product where that is faster, and return the name of the operation."""
        if name != "div" or call.kwargs or not isinstance(call.args[1], Ref) or kind < Kind.SHARED:
            return name
        divisor, size = call.args[1].number, math.prod(self._shape(call.results[0]))
        few = max(1, math.prod(self._shape(divisor)))
        if size < max(WORTH_A_RECIPROCAL if kind is Kind.EACH else 0, 32 * few) and kind is not Kind.STACK:
            return name
        if kind is Kind.STACK or kind is Kind.SHARED or self.single:
            texts[1] = f"{texts[1]}.reciprocal()"
        else:
            texts[1] = f"torch._foreach_reciprocal({texts[1]})"
        return "mul"

    def _write_single(
        self, index: int, call: Call, name: str, arguments: list[Argument], options: dict[str, Any], kind: Kind
    ) -> None:
        """Write a call on tensors, and not on lists."""
        result, texts = call.results[0], [text for text, _ in arguments]
        if len(arguments) == 2 and arguments[0][1] is Kind.EACH:
            name = self._use_reciprocal(call, name, texts, arguments[1][1])
        self._use_scalar(call, name, arguments, texts, "scalar({}, {})")
        position = self._target(index, call, arguments) if kind is Kind.EACH and not options else None
        has_method = name in FOREACH or name == "clamp"
        if name == "clamp" and len({bound is Kind.NUMBER for text, bound in arguments[1:] if text != "None"}) == 2:
            self._write_mixed_clamp(call, texts, kind, in_place=position == 0)
            return
        if position is not None and has_method and (position == 0 or name in COMMUTATIVE):
            others = [text for place, text in enumerate(texts) if place != position]
            in_place = f"{texts[position]}.{name}_({', '.join(others)})"
            has_none = name in ("maximum", "minimum")  # torch has no form of these in place
            self.lines.append(f"torch.{name}({', '.join(texts)}, out={texts[position]})" if has_none else in_place)
            self._take(result, call.args[position].number)
            return
        self.kinds[result] = kind
        if has_method:
            given = [*texts, *(f"{key}={text}" for key, (text, _) in options.items())]
            spare = self._spare(index, call) if kind is Kind.EACH else None
            if spare is not None:
                self.lines.append(f"torch.{name}({', '.join([*given, f'out={self.names[spare]}'])})")
                self._take(result, spare)
                return
            self.names[result] = self._new_name(name)
            self.lines.append(f"{self.names[result]} = torch.{name}({', '.join(given)})")
        else:
            self._write_generic(index, call, name, arguments, options, kind)

    def _write_mixed_clamp(self, call: Call, texts: list[str], kind: Kind, *, in_place: bool) -> None:
        """Write a clamp whose bounds are a number and a tensor, which torch does not take together."""
        text, lower, upper = texts
        if in_place:
            self.lines.append(f"{text}.clamp_min_({lower})")
            self._take(call.results[0], call.args[0].number)
        else:
            self._assign(call, f"torch.clamp_min({text}, {lower})", kind)
        self.lines.append(f"{self.names[call.results[0]]}.clamp_max_({upper})")

    def _write_list(
        self, index: int, call: Call, name: str, arguments: list[Argument], options: dict[str, Any]
    ) -> None:
        """Write a call on lists."""
        result = call.results[0]
        texts = [f"{text}.unbind()" if kind is Kind.STACK else text for text, kind in arguments]
        if len(arguments) == 2 and arguments[0][1] is Kind.EACH:
            stacked = [arguments[0][0], arguments[1][0]]
            if (changed := self._use_reciprocal(call, name, stacked, arguments[1][1])) != name:
                name = changed
                texts[1] = f"{stacked[1]}.unbind()" if arguments[1][1] is Kind.STACK else stacked[1]
        self._use_scalar(call, name, arguments, texts, "scalars({}, {})")
        first_is_list = arguments[0][1] is Kind.EACH
        extra = [f"{key}={text}" for key, (text, _) in options.items()] if set(options) <= {"alpha", "value"} else None
        if name in FOREACH and extra is not None and self._fits_list(call, name, arguments):
            position = self._target(index, call, arguments) if not (options and name != "add") else None
            if position is not None and (position == 0 or (name in COMMUTATIVE and not options)):
                given = [texts[position], *(text for place, text in enumerate(texts) if place != position), *extra]
                self.lines.append(f"torch._foreach_{name}_({', '.join(given)})")
                self._take(result, call.args[position].number)
                return
            if first_is_list:
                spare = self._spare(index, call)
                if spare is not None:
                    given = [self.names[spare], *texts[1:], *extra]
                    self.lines.append(f"torch._foreach_copy_({self.names[spare]}, {texts[0]})")
                    self.lines.append(f"torch._foreach_{name}_({', '.join(given)})")
                    self._take(result, spare)
                    return
                self.kinds[result], self.names[result] = Kind.EACH, self._new_name(name)
                self.lines.append(f"{self.names[result]} = torch._foreach_{name}({', '.join([*texts, *extra])})")
                return
        has_one_order = not options and len(arguments) <= 2 and all(kind is Kind.NUMBER for _, kind in arguments[1:])
        if name == "clamp" and first_is_list and not options:
            shared = [f"[{text}] * len({texts[0]})" if kind is Kind.SHARED else text for text, kind in arguments[1:]]
            self._write_clamp(index, call, [texts[0], *shared])
        elif name == "norm" and first_is_list and self._shape(result) == () and has_one_order:
            function = "norms" if self._has_long_norms(index) else "torch._foreach_norm"
            self._assign(call, f"{function}({', '.join(texts)})", Kind.EACH)
        elif name == "zeros_like" and (spare := self._spare_for_zeros(index, call)) is not None:
            self.lines.append(f"torch._foreach_zero_({self.names[spare]})")
            self._take(result, spare)
        else:
            self._write_generic(index, call, name, arguments, options, Kind.EACH)

    def _use_scalar(self, call: Call, name: str, arguments: list[Argument], texts: list[str], form: str) -> None:
        """Make the argument that is a number a tensor, where that takes less time and gives the same result."""
        places = [place for place, (_, kind) in enumerate(arguments) if kind is Kind.NUMBER]
        if name not in NUMBERS_ARE_SLOW or call.kwargs or places not in ([[0], [1]] if name in COMMUTATIVE else [[1]]):
            return
        place, leaf = places[0], call.args[1 - places[0]]
        if not isinstance(leaf, Ref):  # a number that differs from tensor to tensor
            return
        dtypes = {self.trace.forms[number][1] for number in (leaf.number, *call.results)}
        if self.globals["device"].type == "cpu" and dtypes in ({torch.float32}, {torch.float64}):
            texts[place] = form.format(texts[place], texts[1 - place])

    def _fits_list(self, call: Call, name: str, arguments: list[Argument]) -> bool:
        """Whether a function for lists takes what all tensors share: numbers, or tensors without dimensions."""
        shared = [leaf for leaf, (_, kind) in zip(call.args, arguments, strict=True) if kind is Kind.SHARED]
        return not shared or (name in TAKES_SCALARS and all(self._shape(leaf.number) == () for leaf in shared))

    def _write_clamp(self, index: int, call: Call, texts: list[str]) -> None:
        result, target = call.results[0], call.args[0].number
        text, in_place = texts[0], self._target(index, call, [(texts[0], Kind.EACH)]) is not None
        for bound, name in zip(texts[1:], ("clamp_min", "clamp_max"), strict=False):
            if bound == "None":
                continue
            if in_place:
                self.lines.append(f"torch._foreach_{name}_({text}, {bound})")
            else:
                new = self._new_name(name)
                self.lines.append(f"{new} = torch._foreach_{name}({text}, {bound})")
                text, in_place = new, True
        self.kinds[result], self.names[result] = Kind.EACH, text
        if text == texts[0]:
            self.memory[result] = self.memory[target]

    def _write_generic(
        self, index: int, call: Call, name: str, arguments: list[Argument], options: dict[str, Any], kind: Kind
    ) -> None:
        """Write any call, as a loop over its lists if it has some."""
        given, loop = list[str](), list[tuple[str, str]]()
        schema = call.target._schema.arguments
        named = {argument.name: argument for argument in schema}
        function = self._function(index, call, name, options)
        for position, (text, each) in enumerate(arguments):
            if not (function.startswith("torch.") and (position or name != "where")):
                text = self._as_tensor(text, each, schema[position], call, call.args[position])
            given.append(self._in_loop(text, each, f"v{position}", loop))
        for key, (text, each) in options.items():
            text = self._as_tensor(text, each, named[key], call, call.kwargs[key])
            given.append(f"{key}={self._in_loop(text, each, f'v_{key}', loop)}")
        if name == "_to_copy" and options.keys() == {"dtype"} and kind >= Kind.SHARED:
            expression = f"{given[0]}.to({options['dtype'][0]})"
        else:
            expression = f"{function}({', '.join(given)})"
        if loop:
            expression, kind = _looped(expression, loop), Kind.EACH
        self._assign(call, expression, kind)

    def _function(self, index: int, call: Call, name: str, options: dict[str, Any]) -> str:
        """Return the function to call: one of torch, which is faster, or the operation itself."""
        if name == "norm":
            return "norm" if self._has_long_norms(index) else "vector_norm"
        if name in TAKES_NUMBERS and not options:
            return f"torch.{name}"
        while self.functions.__dict__.setdefault(name, call.target) is not call.target:
            name += "_"
        return f"aten.{name}"

    def _has_long_norms(self, index: int) -> bool:
        """Whether a norm is over so many elements that torch would lose digits of it."""
        return self.globals["device"].type == "cpu" and any(_is_long_norm(trace, index) for trace in self.traces)

    def _assign(self, call: Call, expression: str, kind: Kind) -> None:
        """Give the result of a call a name."""
        is_list = kind is Kind.EACH and not self.single
        names = []
        for number in call.results:
            self.names[number] = self._new_name(RENAMED.get(call.name, call.name).strip("_"))
            self.kinds[number], self.memory[number] = kind, self.memory.get(number, number)
            names.append(self.names[number])
        if len(names) > 1 and is_list:
            expression = f"zip(*{expression})"
        elif is_list and self.stacks and self._shape(call.results[0]) == ():
            stacked = call.results[0]
            self.kinds[stacked], self.memory[stacked] = Kind.STACK, stacked  # a copy, and no view any more
            expression = f"torch.stack({expression})"
        self.lines.append(f"{', '.join(names)} = {expression}")

    def _as_tensor(self, text: str, kind: Kind, argument: Any, call: Call, leaf: Any) -> str:
        """Return the text of a number as a tensor if the operation accepts only tensors, and other text as it is."""
        is_tensor = str(argument.type) in ("Tensor", "Optional[Tensor]") and text != "None"
        if kind is not Kind.NUMBER or not is_tensor:
            return text
        return self._new_tensor(text, leaf.number if isinstance(leaf, Ref) else call.results[0])

    def _new_tensor(self, text: str, number: int) -> str:
        return f"torch.tensor({text}, dtype={self.trace.forms[number][1]}, device=device)"

    def _in_loop(self, text: str, kind: Kind, variable: str, loop: list[Any]) -> str:
        """Return the argument, or the variable of a loop over it, which is added to ``loop``."""
        if kind < Kind.STACK or (self.single and kind is Kind.EACH):
            return text
        loop.append((variable, f"{text}.unbind()" if kind is Kind.STACK else text))
        return variable

    # Results

    def _write_results(self, index: int) -> None:
        """Write each result into the input that it replaces, once it is known and the old value is not needed."""
        is_end = index == len(self.trace.calls)
        for home, value in sorted(self.unwritten.items(), key=lambda pair: pair[0] == self.trace.inputs[TENSOR]):
            if value not in self.names:
                continue
            if self.memory[value] == home and self.names[value] == self.names[home]:
                if is_end:
                    del self.unwritten[home]
                continue
            others = [v for h, v in self.unwritten.items() if h != home]
            same = [each for each, memory in self.memory.items() if memory == home]
            if any(self.last_use.get(each, -1) > index or each in others for each in same):
                continue
            text = self.names[value]
            if self.memory[value] == home:  # a view of the home, such as its transpose: read it before
                text = self._clone(text)
            self._copy(self.names[home], text, self.kinds[value])
            del self.unwritten[home]

    def _clone(self, text: str) -> str:
        return f"{text}.clone()" if self.single else f"[each.clone() for each in {text}]"

    def _copy(self, target: str, text: str, kind: Kind) -> None:
        method = "fill_" if kind is Kind.NUMBER else "copy_"
        if self.single:
            self.lines.append(f"{target}.{method}({text})")
        elif kind in (Kind.EACH, Kind.STACK):
            text = f"{text}.unbind()" if kind is Kind.STACK else text
            self.lines.append(f"torch._foreach_copy_({target}, {text})")
        else:
            self.lines.append(f"for each in {target}:\n        each.{method}({text})")
