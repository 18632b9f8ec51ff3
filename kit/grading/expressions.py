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
from typing import Any, NamedTuple

import sympy
from latex2sympy2_extended.latex2sympy2 import NormalizationConfig, latex2sympy
from math_verify.grader import should_treat_as_complex

from kit.grading.normalize import FONTS
from kit.grading.quantities import Quantity, different_units, read_quantity, read_unit

DECIMAL_DIGITS = 6  # from which a decimal may stand for the number it is rounded from
_TOKENS = re.compile(r"\\begin\{\w+\}|\\end\{\w+\}|\\[a-zA-Z]+|\\.|.", re.DOTALL)
# A quantity's name: x  f'(x)  v_{max}  f^{-1}(x)  m+n  |AB|  [ABC]  \\overline{AB}  (x, y)
_NAME = r"\\?[a-zA-Z]+'{0,2}(?:\^\{-1\}(?=\s*\())?(?:_(?:\{(?:[^{}]|\{[^{}]*\})*\}|\\?\w+))?"
_LABEL = re.compile(
    rf"(?:\\Delta ?)?{_NAME}(?:\s*\([^()]*\))?|m? ?\\?angle ?\w+|[a-z](?: ?\+ ?[a-z])+|"
    r"[A-Z]\^\{-1\}|\|\w+\||\[[A-Z]{3,}\]|\\(?:overline|bar|hat|vec|tilde|dot) ?(?:\{\w+\}|\w)|"
    r"\\(?:sin|cos|tan) ?\\?[a-zA-Z]+|\\frac\{d\w?\}\{d\w\}|"
    rf"\( ?{_NAME}(?: ?, ?{_NAME})+ ?\)"
)
_CASES = re.compile(r"\\begin\{cases\}([^&]*)\\end\{cases\}", re.DOTALL)
_WORD = re.compile(
    r":|(?<![\\a-zA-Z])[a-zA-Z]{4,}|[^\W\d_a-zA-Z]|^[a-zA-Z]{2,}$|(?<![_^\d])\d+\s+\d|"
    r"\\[lc]?dots|\d'|"
    rf"\\{FONTS}(?![a-zA-Z])"
)
_MATRIX = re.compile(r"\\begin\{matrix\}(.*)\\end\{matrix\}", re.DOTALL)
_SET = re.compile(r"[<>]|\\(?:leq|geq|neq|in|cup|cap|setminus|mathbb|emptyset)(?![a-zA-Z])")
_WITH_UNIT = re.compile(
    rf"(.*?[^\s\\])\s*((?:\\{FONTS}\s*\{{|(?<=[\d)}}])[ (][^\W\d_]).*|\\?%)", re.DOTALL
)
# A factorial that no computer writes out.
_HUGE_FACTORIAL = re.compile(r"\d{5,}\W*!|\d\s*!\s*!|\^\s*\{?\d+\}?\W*!")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\\text\{degrees\}")
_INTERVALS = ("()", "(]", "[)", "[]")
_COMMAS = (",", ";")
_BUILDER = re.compile(r"\\\{\s*([a-zA-Z])(?: ?\\in ?\\mathbb\{R\})? ?[|:](.*)\\\}", re.DOTALL)
_SYNTAX = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none"
)


class UnreadableError(ValueError):
    """The text is no answer that can be read as a whole."""


class Scalar(NamedTuple):
    """One expression, with what was written where it is a plain number."""

    expression: Any  # a sympy expression
    unit: str = ""
    written: Quantity | None = None


class Labelled(NamedTuple):
    """`x = 5`, `f(x) = x + 1`: a value and its name."""

    label: str
    value: Any


class Relation(NamedTuple):
    """`difference = 0` or `difference < 0`, where no single variable can be solved for."""

    operator: str  # = or < or <=
    difference: Any


class Range(NamedTuple):
    """A set of real numbers; `variable` is what an inequality speaks of, None for an interval."""

    numbers: sympy.Set
    variable: str | None = None


class Group(NamedTuple):
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
    text = _CASES.sub(lambda cases: cases[1].replace("\\\\", ","), text)
    # marks of alignment, outside a matrix
    if "\\begin{matrix}" not in text:
        text = text.replace("&", " ")

    # several answers
    is_set = _SET.search(text)
    separators = _COMMAS if is_set else (*_COMMAS, "\\and", "\\or")
    if len(_split(text, separators)) > 1:
        return _group(",", text, separators)
    return _read_range(text) if is_set else _read_one(text)


def _read_one(text: str) -> Any:
    """An answer without separators outside brackets, and no range."""
    # one pair of brackets around several answers, or around an equation
    inner, kind = _brackets(text)
    if kind == "{}" or (kind and len(_split(inner, _COMMAS)) > 1):
        return _group(kind, inner, _COMMAS)
    equation = inner if kind == "()" else text
    sides = [side.strip() for side in _split(equation, ("=", "\\approx"))]
    if len(sides) > 1:
        return _read_equation(equation, sides)
    if "\\pm" in text or "\\mp" in text:
        return read(_both_signs(text))
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
    return Group(kind, _distinct(tuple(items)) if kind == "{}" else tuple(items))


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
    """Each choice of signs: several are free, unless one is the opposite of another."""
    if "\\mp" in text or text.count("\\pm") > 3:
        plus = text.replace("\\pm", "+").replace("\\mp", "-")
        minus = text.replace("\\pm", "-").replace("\\mp", "+")
        return f"{plus}, {minus}"
    if "\\pm" not in text:
        return text
    return ", ".join(_both_signs(text.replace("\\pm", sign, 1)) for sign in "+-")


def _read_scalar(text: str) -> Scalar:
    """One expression, a unit after it set aside."""
    if _TRIGONOMETRIC.search(text):
        text = _DEGREES.sub(r"\\frac{\1\\pi}{180}", text)
    with_unit = _WITH_UNIT.fullmatch(text)
    unit = read_unit(with_unit[2]) if with_unit else None
    # 1 - 70% is no 69 percent
    if unit == "%" and len(_split(text.lstrip("-+"), ("+", "-"))) > 1:
        unit = None
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
    if _WORD.search(text) or _HUGE_FACTORIAL.search(text) or not text.strip():
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


def _read_equation(text: str, sides: list[str]) -> Any:
    """`x = 5`, `2 + 3 = 5`, `1/3 \\approx 0.33`, `2x - y + 1 = 0`."""
    # a name is set aside; of two sides it may be either
    if len(sides) == 2:
        sides.sort(key=lambda side: _LABEL.fullmatch(side) is None)
    label = sides.pop(0) if _LABEL.fullmatch(sides[0]) else ""
    values = [read(side) for side in sides]
    if len(values) == 1:
        return _named(label, values[0])
    if not all(isinstance(part, Scalar) for part in values):
        raise UnreadableError(text)
    is_constant = not any(part.expression.free_symbols for part in values)
    is_rounded = "\\approx" in text
    if label or is_constant:
        _check_chain(values, is_constant and is_rounded)
        return _named(label, values[0])
    if len(values) > 2 or is_rounded:
        raise UnreadableError(text)
    return Relation("=", values[0].expression - values[1].expression)


def _named(label: str, value: Any) -> Any:
    """A value with its name; (x, y) = (1, 2) with a name for each."""
    label = label.replace(" ", "").casefold()
    names = label.strip("()").split(",")
    if len(names) > 1 and isinstance(value, Group) and len(value.items) == len(names):
        return Group("()", tuple(map(Labelled, names, value.items)))
    return Labelled(label, value) if label else value


def _check_chain(values: list[Scalar], is_rounded: bool) -> None:
    """Every part of `1/3 = 2/6 \\approx 0.33` must be the same number, or near it if rounded."""
    first = values[0]
    for value in values[1:]:
        if not _equal(first, value) and not (is_rounded and _is_near(value, first.expression)):
            raise UnreadableError("its parts differ")


def _is_near(rounded: Scalar, exact: Any) -> bool:
    """Whether a number was rounded to a decimal or a round number, or cut off: 0.33, 1200."""
    if rounded.written is None:
        return bool(abs(sympy.N(rounded.expression / exact - 1)) < 0.01)
    zeros = 0
    while zeros < 20 and rounded.written.value % 10 ** (zeros + 1) == 0:
        zeros += 1
    return _in_last_place(rounded.expression, exact, rounded.written.places or -zeros)


def _in_last_place(decimal: Any, exact: Any, places: int) -> bool:
    excess = sympy.N(abs(exact) - abs(decimal), 50) * sympy.Integer(10) ** places
    signs = sympy.sign(exact) == sympy.sign(decimal)
    return bool(signs and excess.is_real and -0.5 <= excess < 1)


def _read_range(text: str) -> Any:
    """Intervals, unions, inequalities and set builders."""
    named = re.fullmatch(rf"({_LABEL.pattern}) ?(?:\\in|=) ?(.*)", text, re.DOTALL)
    if named:
        value = read(named[2])
        if isinstance(value, Group) and value.kind in _INTERVALS:
            value = _interval(value)
        return Labelled(named[1].casefold(), value)
    # \\{x | 1 < x\\}
    builder = _BUILDER.fullmatch(text)
    if builder:
        numbers = _read_range(builder[2].replace(",", "\\and "))
        # {x | y > 1} is no set of x
        if not isinstance(numbers, Range) or numbers.variable not in (None, builder[1]):
            raise UnreadableError(text)
        return numbers._replace(variable=None)
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


def _interval(group: Group) -> Range:
    if len(group.items) != 2 or not all(isinstance(item, Scalar) for item in group.items):
        raise UnreadableError(group.kind)
    start, end = (item.expression for item in group.items)
    return Range(sympy.Interval(start, end, group.kind[0] == "(", group.kind[1] == ")"))


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
            return _interval(value)
        items = [_alike(item, other) for item in value.items]
        sets = [item.numbers for item in items if isinstance(item, Range)]
        if value.kind == "," and len(sets) == len(items):
            both = sympy.Intersection(*sets)
            return Range(sympy.Union(*sets) if both == sympy.S.EmptySet else both)
    is_single = value.kind in (",", "{}") and len(_distinct(value.items)) == 1
    return value.items[0] if is_single else value


def _equal_labelled(gold: Any, answer: Any) -> bool:
    if isinstance(gold, Labelled) and isinstance(answer, Labelled):
        if gold.label == answer.label:
            return _equal(gold.value, answer.value)
        # x + y = 7 and y + x = 7
        with suppress(UnreadableError, AttributeError, ValueError):
            return _equal(_relation(gold), _relation(answer))
        return False
    named, other = (gold, answer) if isinstance(gold, Labelled) else (answer, gold)
    # x + y = 7 may be a line, which 7 is not
    if named is gold and "+" in named.label and isinstance(other, Scalar):
        return False
    if isinstance(other, Relation) and isinstance(named.value, Scalar):
        return _equal(_relation(named), other)
    if isinstance(other, Range) and other.variable and isinstance(named.value, Range):
        return other.variable == named.label and _equal(named.value, Range(other.numbers))
    return _equal(named.value, other)


def _relation(equation: Labelled) -> Relation:
    """`x + y = 7` without a name set aside."""
    return Relation("=", _parse(equation.label) - equation.value.expression)


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
    return scalar.unit == "%" or (scalar.written is not None and scalar.written.percent)


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
    return _in_last_place(decimal.expression, number, written.places)


def _equal_expressions(first: Any, second: Any) -> bool:
    """Exactly equal: refuted by numbers at a few points, else proven by simplification."""
    # 1/0 equals nothing, not even itself
    if first.has(sympy.zoo, sympy.nan) or second.has(sympy.zoo, sympy.nan):
        return False
    if first == second:
        return True
    if first.is_Rational and second.is_Rational:
        return False
    first, second = _with_imaginary_unit(first, second)
    if first.has(sympy.oo) or second.has(sympy.oo) or _refuted(first, second):
        return False
    # roots of letters mean letters that are not negative
    difference = first - second
    if _radicands(difference):
        symbols = difference.free_symbols
        positive = {symbol: sympy.Dummy(str(symbol), positive=True) for symbol in symbols}
        difference = difference.subs(positive)
    difference = sympy.simplify(difference)
    return bool(difference == 0 or difference.equals(0))


def _with_imaginary_unit(first: Any, second: Any) -> tuple[Any, Any]:
    """Both with i as the imaginary unit, where it is their only letter."""
    symbols = first.free_symbols | second.free_symbols
    if any(str(symbol) != "i" for symbol in symbols):
        return first, second
    unit = dict.fromkeys(symbols, sympy.I)
    return first.subs(unit), second.subs(unit)


def _refuted(first: Any, second: Any) -> bool:
    """Whether numbers for the letters, of either sign, tell two expressions apart."""
    symbols = sorted(first.free_symbols | second.free_symbols, key=str)
    roots = _radicands(first) | _radicands(second)
    for shift in (3, -5, 7):
        point = {symbol: sympy.Rational(shift, 4 + index) for index, symbol in enumerate(symbols)}
        if any(sympy.N(root.subs(point)).is_negative for root in roots):
            continue
        values = [sympy.N(side.subs(point), 40) for side in (first, second)]
        if all(value.is_number and value.is_finite for value in values):
            distance = abs(values[0] - values[1])
            if distance > (abs(values[0]) + abs(values[1])) * sympy.Float("1e-30", 40):
                return True
    return False


def _radicands(expression: Any) -> set[Any]:
    """What stands with letters under a root."""
    powers = expression.atoms(sympy.Pow)
    return {power.base for power in powers if power.exp.is_Rational and power.exp.q > 1}


def _equal_sets(gold: sympy.Set, answer: sympy.Set) -> bool:
    if not isinstance(gold, sympy.Interval) or not isinstance(answer, sympy.Interval):
        return bool(gold == answer)
    ends_open = (gold.left_open, gold.right_open) == (answer.left_open, answer.right_open)
    starts = _equal_expressions(gold.start, answer.start)
    return ends_open and starts and _equal_expressions(gold.end, answer.end)


def _equal_groups(gold: Group, answer: Group) -> bool:
    # a vector in a column or a row
    if (gold.kind == "matrix") != (answer.kind == "matrix"):
        gold, answer = _as_vector(gold), _as_vector(answer)
    kinds = {gold.kind, answer.kind}
    unordered = kinds <= {",", "{}"}
    # a list may say an answer twice, where the other says it once
    if unordered and len(gold.items) != len(answer.items):
        gold, answer = (group._replace(items=_distinct(group.items)) for group in (gold, answer))
    named = [_names(group) for group in (gold, answer)]
    # `x = 1, y = 2` is the tuple (1, 2)
    is_tuple = kinds == {",", "()"} and max(named) == len(gold.items)
    if len(gold.items) != len(answer.items) or not (unordered or is_tuple or len(kinds) == 1):
        return False
    # names that differ from item to item: where one side has none, the order tells which is which
    # (a set tells nothing)
    if answer.kind == "{}" and named[0] > 1 > named[1]:
        return False
    if unordered and (max(named) < 2 or min(named) == max(named)):
        return _matched(gold.items, answer.items)
    pairs = zip(_in_order(gold), _in_order(answer), strict=True)
    return all(_equal(one, other) for one, other in pairs)


def _as_vector(group: Group) -> Group:
    """A matrix of one row or one column as the tuple that it is."""
    if group.kind != "matrix":
        return group
    if len(group.items) == 1:
        return group.items[0]
    if all(len(row.items) == 1 for row in group.items):
        return Group("()", tuple(row.items[0] for row in group.items))
    return group


def _in_order(group: Group) -> tuple[Any, ...]:
    """Its items; those named by neighbours in the alphabet in the order of their names."""
    labels = [item.label for item in group.items if isinstance(item, Labelled)]
    letters = "".join(sorted(labels))
    if len(labels) == len(group.items) and letters in "abcdefghijklmnopqrstuvwxyz":
        return tuple(sorted(group.items, key=lambda item: item.label))
    return group.items


def _names(group: Group) -> int:
    """How many different names its items have: `x = 1, y = 2` has two."""
    return len({item.label for item in group.items if isinstance(item, Labelled)})


def _distinct(items: tuple[Any, ...]) -> tuple[Any, ...]:
    distinct: list[Any] = []
    for item in items:
        if not any(_equal(item, other) for other in distinct):
            distinct.append(item)
    return tuple(distinct)


def _matched(golds: tuple[Any, ...], answers: tuple[Any, ...]) -> bool:
    """Whether every gold item has an answer of its own."""
    left = list(answers)
    for gold in golds:
        match = next((answer for answer in left if _equal(gold, answer)), None)
        if match is None:
            return False
        left.remove(match)
    return True
