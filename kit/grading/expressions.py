r"""Mathematical answers read into values, and compared exactly: the part of grading that needs
sympy (section 4, Eq. 9).

An answer is a scalar with a unit, an equation, a set of real numbers (intervals, inequalities), or
a group of answers (a list, a tuple, a matrix). It is read as a whole or not at all: nothing is
fished out of what cannot be read.

Paper: math-verify, which compares floats to six decimals. Here: math-verify's parser for the single
expressions, exact rationals, and a decimal stands for another number only where it has six correct
digits or more.
"""

import re
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import NormalizationConfig, latex2sympy
from math_verify.grader import should_treat_as_complex

from kit.grading.normalize import FONTS
from kit.grading.quantities import Quantity, different_units, read_quantity, read_unit

DECIMAL_DIGITS = 6  # from which a decimal may stand for the number it is rounded from
_TOKENS = re.compile(r"\\begin\{\w+\}|\\end\{\w+\}|\\[a-zA-Z]+|\\.|.", re.DOTALL)
_LABEL = re.compile(r"\\?[a-zA-Z]+'?(?:_(?:\{[^{}]*\}|\\?\w+))?(?:\s*\([^()]*\))?|\\?angle \w+")
_WORD = re.compile(
    r":|(?<![\\a-zA-Z])[a-zA-Z]{4,}|[^\W\d_a-zA-Z]|^[a-zA-Z]{2,}$|(?<![_^\d])\d+\s+\d|"
    r"\\[lc]?dots|\d'|"
    rf"\\{FONTS}(?![a-zA-Z])"
)
_MATRIX = re.compile(r"\\begin\{matrix\}(.*)\\end\{matrix\}", re.DOTALL)
_SET = re.compile(r"[<>]|\\(?:leq|geq|neq|in|cup|cap|setminus|mathbb|emptyset)(?![a-zA-Z])")
_WITH_UNIT = re.compile(rf"(.*?[^\s\\])\s*((?:\\{FONTS}\s*\{{|(?<=[\d)}}])[ (][^\W\d_]).*)")
_INTERVALS = ("()", "(]", "[)", "[]")
_BUILDER = re.compile(r"\\\{\s*[a-zA-Z](?: ?\\in ?\\mathbb\{R\})? ?[|:](.*)\\\}", re.DOTALL)
_SYNTAX = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none"
)


class UnreadableError(ValueError):
    """The text is no answer that can be read as a whole."""


@dataclass(frozen=True)
class Scalar:
    """One expression, with what was written where it is a plain number."""

    expression: Any  # a sympy expression
    unit: str = ""
    written: Quantity | None = None


@dataclass(frozen=True)
class Labelled:
    """`x = 5`, `f(x) = x + 1`: a value and its name."""

    label: str
    value: Any


@dataclass(frozen=True)
class Relation:
    """`difference = 0` or `difference < 0`, where no single variable can be solved for."""

    operator: str  # = or < or <=
    difference: Any


@dataclass(frozen=True)
class Range:
    """A set of real numbers; `variable` is what an inequality speaks of, None for an interval."""

    numbers: sympy.Set
    variable: str | None = None


@dataclass(frozen=True)
class Group:
    """Several answers. `kind`: `,` a list, `{}` a set, `()` `[]` `(]` `[)` in order, matrix."""

    kind: str
    items: tuple[Any, ...]


def same(gold: str, answer: str) -> bool:
    """Whether two answers in normal form are equal.

    Raises:
        UnreadableError: one of them cannot be read.
    """
    return _equal(read(gold), read(answer))


def read(text: str) -> Any:
    """The value of an answer in normal form: Scalar, Labelled, Relation, Range or Group."""
    text = text.strip(" .,;")
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        rows = [row for row in re.split(r"\\\\(?:\[\w+\])?", matrix[1]) if row.strip()]
        return Group("matrix", tuple(_group("()", row, ("&",)) for row in rows))
    quantity = read_quantity(text)
    if quantity:
        return Scalar(sympy.Rational(quantity.value), quantity.unit, quantity)
    text = text.replace("&", "")

    # several answers
    is_set = _SET.search(text)
    separators = (",", ";") if is_set else (",", ";", "\\and", "\\or")
    if len(_split(text, separators)) > 1:
        return _group(",", text, separators)
    if is_set:
        return _read_range(text)

    # one pair of brackets around several answers
    inner, kind = _brackets(text)
    if kind == "{}" or (kind and len(_split(inner, (",", ";"))) > 1):
        return _group(kind, inner, (",", ";"))
    if re.search(r"=|\\approx", text):
        return _read_equation(text)
    if "\\pm" in text or "\\mp" in text:
        return _group(",", _both_signs(text), (",",))
    return _read_scalar(text)


def _group(kind: str, text: str, separators: tuple[str, ...]) -> Group:
    """The answers between separators; a list within a list is a part of it."""
    items: list[Any] = []
    for part in _split(text, separators):
        if not part.strip():
            continue
        value = read(part)
        if isinstance(value, Group) and value.kind == "," and kind in (",", "{}"):
            items.extend(value.items)
        else:
            items.append(value)
    return Group(kind, tuple(_distinct(items) if kind in (",", "{}") else items))


def _split(text: str, separators: tuple[str, ...]) -> list[str]:
    """The parts between separators outside brackets."""
    parts = [""]
    depth = 0
    for token in _TOKENS.findall(text):
        if token in ("(", "[", "{", "\\{") or token.startswith("\\begin{"):
            depth += 1
        if token in (")", "]", "}", "\\}") or token.startswith("\\end{"):
            depth -= 1
        if token in separators and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return parts


def _brackets(text: str) -> tuple[str, str]:
    """What one pair of brackets encloses, and the pair; the text and "" where none encloses all of
    it.
    """
    match = re.fullmatch(r"(\\\{|\(|\[)(.*)(\\\}|\)|\])", text, re.DOTALL)
    if match is None:
        return text, ""
    depth = 0
    tokens = _TOKENS.findall(text)
    for number, token in enumerate(tokens, 1):
        depth += token in ("(", "[", "\\{")
        depth -= token in (")", "]", "\\}")
        if depth == 0 and number < len(tokens):
            return text, ""
    return match[2], (match[1] + match[3]).replace("\\", "")


def _both_signs(text: str) -> str:
    plus = text.replace("\\pm", "+").replace("\\mp", "-")
    minus = text.replace("\\pm", "-").replace("\\mp", "+")
    return f"{plus}, {minus}"


def _read_scalar(text: str) -> Scalar:
    """One expression, a unit after it set aside."""
    with_unit = _WITH_UNIT.fullmatch(text)
    unit = read_unit(with_unit[2]) if with_unit else None
    if with_unit is None or not unit:
        return Scalar(_parse(text))
    number = read(with_unit[1])
    if not isinstance(number, Scalar):
        raise UnreadableError(text)
    return Scalar(number.expression, unit, number.written)


def _parse(text: str) -> Any:
    """A sympy expression with exact numbers."""
    expression = _latex(text)
    if not isinstance(expression, sympy.Expr):
        raise UnreadableError(text)
    return expression


def _latex(text: str) -> Any:
    """What a text stands for with exact numbers: an expression, a set or a relation."""
    if _WORD.search(text) or not text.strip():
        raise UnreadableError(text)
    exact = re.sub(r"(\d*)\.(\d*)\\overline ?\{?(\d+)\}?", _repeating, text)
    exact = re.sub(r"(?<![\d.])(\d*)\.(\d+)(?![\d.])", _exact_decimal, exact)
    try:
        value = latex2sympy(
            exact,
            is_real=not should_treat_as_complex(text),
            convert_degrees=False,
            normalization_config=_SYNTAX,
        )
        return value.doit()
    except MemoryError:
        raise
    except Exception:  # the parser raises bare Exception, and sympy many kinds
        raise UnreadableError(text) from None


def _exact_decimal(match: re.Match[str]) -> str:
    return rf"(\frac{{{match[1]}{match[2]}}}{{1{'0' * len(match[2])}}})"


def _repeating(match: re.Match[str]) -> str:
    whole, once, again = match.groups()
    tail = "0" * len(once)
    nines = "9" * len(again)
    return rf"(\frac{{{whole}{once}}}{{1{tail}}}+\frac{{{again}}}{{{nines}{tail}}})"


def _read_equation(text: str) -> Any:
    """`x = 5`, `2 + 3 = 5`, `1/3 \\approx 0.33`, `2x - y + 1 = 0`."""
    sides = [side.strip() for side in _split(text, ("=", "\\approx"))]
    # a name is set aside; of two sides it may be either
    if len(sides) == 2:
        sides.sort(key=lambda side: _LABEL.fullmatch(side) is None)
    label = sides.pop(0) if _LABEL.fullmatch(sides[0]) else ""
    values = [read(side) for side in sides]
    value = values[0]
    if len(values) > 1:
        if not all(isinstance(part, Scalar) for part in values):
            raise UnreadableError(text)
        is_constant = not any(part.expression.free_symbols for part in values)
        is_rounded = "\\approx" in text
        if label or is_constant:
            _check_chain(values, is_constant and is_rounded)
        elif len(values) == 2 and not is_rounded:
            value = Relation("=", value.expression - values[1].expression)
        else:
            raise UnreadableError(text)
    return Labelled(label.replace(" ", "").casefold(), value) if label else value


def _check_chain(values: list[Scalar], is_rounded: bool) -> None:
    """Every part of `1/3 = 2/6 \\approx 0.33` must be the same number, or near it if rounded."""
    first = values[0].expression
    for value in values[1:]:
        if _equal(values[0], value):
            continue
        distance = abs(sympy.N(value.expression - first)) if is_rounded else sympy.oo
        if not distance <= 0.05 * abs(sympy.N(first)):
            raise UnreadableError(str(value))


def _read_range(text: str) -> Any:
    """Intervals, unions, inequalities and set builders."""
    named = re.fullmatch(rf"({_LABEL.pattern}) ?(?:\\in|=) ?(.*)", text, re.DOTALL)
    if named:
        value = read(named[2])
        if isinstance(value, Group) and value.kind in _INTERVALS:
            value = Range(_interval(value))
        return Labelled(named[1].casefold(), value)
    # \\{x | 1 < x\\}
    builder = _BUILDER.fullmatch(text)
    if builder:
        return replace(_read_range(builder[1].replace(",", "\\and ")), variable=None)
    if "\\pm" in text and "\\neq" in text:
        text = _both_signs(text).replace(",", "\\and ")
    for name, combine in (("\\or", sympy.Union), ("\\and", sympy.Intersection)):
        parts = _split(text, (name,))
        if len(parts) > 1:
            return _combined([_read_range(part) for part in parts], combine)
    value = _latex(text.strip(" ."))
    if isinstance(value, sympy.Set):
        return Range(value)
    # in one variable it is a set of numbers, in several it stays a relation
    variables = sorted(map(str, value.free_symbols))
    if len(variables) < 2:
        with suppress(NotImplementedError, TypeError, ValueError, AttributeError):
            return Range(value.as_set(), *variables)
    if not isinstance(value, (sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge)):
        raise UnreadableError(text)
    strict = isinstance(value, (sympy.Lt, sympy.Gt))
    return Relation("<" if strict else "<=", value.lts - value.gts)


def _combined(ranges: list[Any], combine: Any) -> Range:
    """The union or intersection of ranges of one variable."""
    if not all(isinstance(part, Range) for part in ranges):
        raise UnreadableError(combine)
    variables = {part.variable for part in ranges} - {None}
    if len(variables) > 1:
        raise UnreadableError(variables)
    return Range(combine(*[part.numbers for part in ranges]), *variables)


def _interval(group: Group) -> sympy.Set:
    if len(group.items) != 2 or not all(isinstance(item, Scalar) for item in group.items):
        raise UnreadableError(group.kind)
    start, end = (item.expression for item in group.items)
    return sympy.Interval(start, end, group.kind[0] == "(", group.kind[1] == ")")


def _equal(gold: Any, answer: Any) -> bool:
    """Whether two values are the same answer."""
    if isinstance(gold, Labelled) or isinstance(answer, Labelled):
        return _equal_labelled(gold, answer)
    gold, answer = _alike(gold, answer), _alike(answer, gold)
    if type(gold) is not type(answer):
        return False
    if isinstance(gold, Scalar):
        return _equal_scalars(gold, answer)
    if isinstance(gold, Relation):
        ratio = sympy.simplify(gold.difference / answer.difference)
        fits = ratio.is_number and (ratio.is_nonzero if gold.operator == "=" else ratio.is_positive)
        return bool(gold.operator == answer.operator and fits)
    if isinstance(gold, Range):
        named = gold.variable and answer.variable and gold.variable != answer.variable
        return not named and _equal_sets(gold.numbers, answer.numbers)
    return _equal_groups(gold, answer)


def _alike(value: Any, other: Any) -> Any:
    """A value in the form of the other, where it can be: a pair as an interval, a set of one as its
    element.
    """
    if not isinstance(value, Group) or isinstance(other, Group):
        return value
    if isinstance(other, Range):
        if value == Group("{}", ()):
            return Range(sympy.S.EmptySet)
        if value.kind in _INTERVALS and len(value.items) == 2:
            return Range(_interval(value))
        if value.kind == "," and all(isinstance(item, Range) for item in value.items):
            sets = [item.numbers for item in value.items]
            both = sympy.Intersection(*sets)
            return Range(sympy.Union(*sets) if both == sympy.S.EmptySet else both)
    is_single = value.kind in (",", "{}") and len(value.items) == 1
    return value.items[0] if is_single else value


def _equal_labelled(gold: Any, answer: Any) -> bool:
    if isinstance(gold, Labelled) and isinstance(answer, Labelled):
        return gold.label == answer.label and _equal(gold.value, answer.value)
    named, other = (gold, answer) if isinstance(gold, Labelled) else (answer, gold)
    if isinstance(other, Relation) and isinstance(named.value, Scalar):
        difference = _parse(named.label) - named.value.expression
        return _equal(Relation("=", difference), other)
    if isinstance(other, Range) and other.variable and isinstance(named.value, Range):
        return other.variable == named.label and _equal(named.value, Range(other.numbers))
    return _equal(named.value, other)


def _equal_scalars(gold: Scalar, answer: Scalar) -> bool:
    if different_units(gold.unit, answer.unit):
        return False
    if _equal_expressions(gold.expression, answer.expression):
        return True
    # 20% is also 0.2
    if _in_percent(gold) != _in_percent(answer):
        scale = 100 if _in_percent(gold) else sympy.Rational(1, 100)
        if _equal_expressions(gold.expression, answer.expression * scale):
            return True
    return _rounded(gold, answer) or _rounded(answer, gold)


def _in_percent(scalar: Scalar) -> bool:
    return scalar.written is not None and scalar.written.percent


def _rounded(decimal: Scalar, exact: Scalar) -> bool:
    """Whether a decimal with enough digits stands for a number that is none."""
    written = decimal.written
    if written is None or not written.places or written.digits < DECIMAL_DIGITS:
        return False
    if exact.written is not None or exact.expression.free_symbols:
        return False
    number = exact.expression
    if number.is_Rational and set(sympy.factorint(number.q)) <= {2, 5}:
        return False  # it has a last decimal of its own
    # rounded, or cut off
    excess = sympy.N(abs(number) - abs(decimal.expression), 50) * 10**written.places
    signs = sympy.sign(number) == sympy.sign(decimal.expression)
    return bool(signs and excess.is_real and -0.5 <= excess < 1)


def _equal_expressions(first: Any, second: Any) -> bool:
    """Exactly equal: refuted by numbers at a few points, else proven by simplification."""
    if first == second:
        return True
    if first.is_Rational and second.is_Rational:
        return False
    if first.has(sympy.oo, sympy.zoo, sympy.nan) or second.has(sympy.oo, sympy.zoo, sympy.nan):
        return False
    # refuted at a few points, of either sign
    symbols = sorted(first.free_symbols | second.free_symbols, key=str)
    for shift in (3, -5, 7):
        point = {symbol: sympy.Rational(shift, 4 + index) for index, symbol in enumerate(symbols)}
        values = [sympy.N(side.subs(point), 40) for side in (first, second)]
        if all(value.is_number and value.is_finite for value in values):
            distance = abs(values[0] - values[1])
            if distance > (abs(values[0]) + abs(values[1])) * sympy.Float("1e-30", 40):
                return False
    # proven
    difference = sympy.simplify(first - second)
    return bool(difference == 0 or difference.equals(0))


def _equal_sets(gold: sympy.Set, answer: sympy.Set) -> bool:
    if not isinstance(gold, sympy.Interval) or not isinstance(answer, sympy.Interval):
        return bool(gold == answer)
    ends_open = (gold.left_open, gold.right_open) == (answer.left_open, answer.right_open)
    starts = _equal_expressions(gold.start, answer.start)
    return ends_open and starts and _equal_expressions(gold.end, answer.end)


def _equal_groups(gold: Group, answer: Group) -> bool:
    kinds = {gold.kind, answer.kind}
    unordered = kinds <= {",", "{}"}
    named = [_names(group) for group in (gold, answer)]
    # `x = 1, y = 2` is the tuple (1, 2)
    is_tuple = kinds == {",", "()"} and max(named) == len(gold.items)
    if len(gold.items) != len(answer.items) or not (unordered or is_tuple or len(kinds) == 1):
        return False
    # names that differ from item to item: where one side has none, the order tells which is which
    if unordered and (max(named) < 2 or min(named) == max(named)):
        return _matched(gold.items, answer.items)
    return all(_equal(one, other) for one, other in zip(gold.items, answer.items, strict=True))


def _names(group: Group) -> int:
    """How many different names its items have: `x = 1, y = 2` has two."""
    return len({item.label for item in group.items if isinstance(item, Labelled)})


def _distinct(items: Any) -> list[Any]:
    distinct: list[Any] = []
    for item in items:
        if not any(_equal(item, other) for other in distinct):
            distinct.append(item)
    return distinct


def _matched(golds: tuple[Any, ...], answers: tuple[Any, ...]) -> bool:
    """Whether every gold item has an answer of its own; both are of one length."""
    left = list(answers)
    for gold in golds:
        match = next((answer for answer in left if _equal(gold, answer)), None)
        if match is None:
            return False
        left.remove(match)
    return True
