"""Pairs of answers whose equality is known by construction: a value is drawn, then written in two
of its forms.

`pair(seed)` gives (gold, answer, equal). An unequal pair differs in one number, one end, one sign
or one unit.
"""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

UNITS = {
    "cm": ("cm", "centimeters"),
    "km": ("km", "kilometers"),
    "min": ("min", "minutes"),
    "hours": ("hours", "hr"),
    "kg": ("kg", "kilograms"),
}


def pair(seed: int) -> tuple[str, str, bool]:
    """A gold answer, an answer, and whether they are equal."""
    rng = random.Random(seed)
    kind = rng.choice(sorted(KINDS))
    draw, write, change = KINDS[kind]
    value = draw(rng)
    equal = rng.random() < 0.5
    other = value
    while not equal and other == value:
        other = change(rng, value)
    answer = write(rng, other)
    dress = rng.choice(["{}", "${}$", "\\displaystyle {}", "{}.", "\\({}\\)", " {} "])
    return write(rng, value), dress.replace("{}", answer), equal


def draw_number(rng: random.Random) -> Fraction:
    whole = rng.choice([rng.randint(-20, 20), rng.randint(-2000, 90000), rng.randint(1, 9)])
    return Fraction(whole, rng.choice([1, 1, 2, 4, 5, 8, 3, 7, 9, 10, 100]))


def write_number(rng: random.Random, value: Fraction) -> str:
    sign = "-" if value < 0 else ""
    size = abs(value)
    forms = [
        rf"{sign}\frac{{{size.numerator}}}{{{size.denominator}}}",
        rf"\dfrac{{{sign}{size.numerator}}}{{{size.denominator}}}",
        f"{sign}{size.numerator}/{size.denominator}",
        rf"\frac{{{2 * value.numerator}}}{{{2 * value.denominator}}}",
    ]
    if size.denominator == 1:
        number = size.numerator
        forms = [f"{sign}{number}", f"{sign}{number}.0", f"\u2212{number}" if sign else str(number)]
        forms += [rf"\frac{{{3 * value.numerator}}}{{3}}", f"{sign}{number}"]
    elif size > 1:
        whole, rest = divmod(size.numerator, size.denominator)
        forms.append(rf"{sign}{whole}\frac{{{rest}}}{{{size.denominator}}}")
        forms.append(f"{sign}{whole} {rest}/{size.denominator}")
    if 10**6 % size.denominator == 0 and size.denominator > 1:
        forms.append(f"{sign}{float(size):.6f}".rstrip("0"))
    return rng.choice(forms)


def change_number(rng: random.Random, value: Fraction) -> Fraction:
    changes = [-value, value + 1, value - 1, 10 * value, value / 10, value + Fraction(1, 3)]
    changes += [1 / value] if value else []
    changes.append(value + Fraction(1, 10**6))
    return rng.choice(changes)


def draw_scientific(rng: random.Random) -> tuple[int, int]:
    return rng.randint(11, 99), rng.choice([-30, -12, -7, -3, 4, 8, 23, 33])


def write_scientific(rng: random.Random, value: tuple[int, int]) -> str:
    digits, power = value
    mantissa = f"{digits / 10}"
    exact = Fraction(digits, 10) * Fraction(10) ** power
    forms = [
        f"{mantissa}e{power}",
        f"{mantissa}E{power:+03d}",
        rf"{mantissa} \times 10^{{{power}}}",
        rf"{mantissa}\cdot10^{{{power}}}",
        rf"{digits} \times 10^{{{power - 1}}}",
    ]
    if exact.denominator == 1:
        forms.append(str(exact.numerator))
    return rng.choice(forms)


def change_scientific(rng: random.Random, value: tuple[int, int]) -> tuple[int, int]:
    digits, power = value
    return rng.choice(
        [(digits + 1, power), (digits, power + 1), (digits, -power), (digits, power - 1)]
    )


def draw_root(rng: random.Random) -> tuple[int, int, int]:
    """a + b * sqrt(c)"""
    return rng.randint(-6, 6), rng.choice([-3, -2, 2, 3, 5]), rng.choice([2, 3, 5, 6, 7])


def write_root(rng: random.Random, value: tuple[int, int, int]) -> str:
    a, b, c = value
    head = str(a) if a else ""
    plus = "+" if b > 0 and a else ""
    under = b * b * c
    inner = f"{'-' if b < 0 else plus}\\sqrt{{{under}}}"
    forms = [f"{head}{plus}{b}\\sqrt{{{c}}}", f"{head}{inner}"]
    forms.append(f"{b}\\sqrt{c}{a:+d}" if a else f"{b}\\sqrt{c}")
    forms.append(rf"\frac{{{2 * a}{2 * b:+d}\sqrt{{{c}}}}}{{2}}")
    return rng.choice(forms)


def change_root(rng: random.Random, value: tuple[int, int, int]) -> tuple[int, int, int]:
    a, b, c = value
    return rng.choice([(a, -b, c), (a + 1, b, c), (-a, b, c), (a, b, c + 4)])


def draw_interval(rng: random.Random) -> tuple[Any, ...]:
    start = rng.randint(-9, 8)
    return start, start + rng.randint(1, 9), rng.random() < 0.5, rng.random() < 0.5


def write_interval(rng: random.Random, value: tuple[Any, ...]) -> str:
    start, end, closed_left, closed_right = value
    left = "[" if closed_left else "("
    right = "]" if closed_right else ")"
    first = rng.choice([r"\le", r"\leq", "≤", r"\leqslant"]) if closed_left else "<"
    second = rng.choice([r"\le", r"\leq", "≤"]) if closed_right else "<"
    back = {"<": ">"}.get(second, r"\geq"), {"<": ">"}.get(first, r"\ge")
    forms = [
        f"{left}{start}, {end}{right}",
        rf"\left{left}{start},{end}\right{right}",
        f"{start} {first} x {second} {end}",
        rf"\{{x \mid {start} {first} x {second} {end}\}}",
        rf"\{{ x \in \mathbb{{R}} : {start} {first} x {second} {end} \}}",
        rf"x \in {left}{start}, {end}{right}",
        f"{end} {back[0]} x {back[1]} {start}",
    ]
    return rng.choice(forms)


def change_interval(rng: random.Random, value: tuple[Any, ...]) -> tuple[Any, ...]:
    start, end, left, right = value
    changes = [(start, end, not left, right), (start, end, left, not right)]
    changes += [(start - 1, end, left, right), (start, end + 1, left, right)]
    return rng.choice(changes)


def draw_union(rng: random.Random) -> tuple[Any, ...]:
    start = rng.randint(-9, 5)
    return start, start + rng.randint(1, 5), rng.random() < 0.5, rng.random() < 0.5


def write_union(rng: random.Random, value: tuple[Any, ...]) -> str:
    start, end, left, right = value
    first = rf"(-\infty, {start}{']' if left else ')'}"
    second = rf"{'[' if right else '('}{end}, \infty)"
    below = r"\le" if left else "<"
    above = r"\ge" if right else ">"
    low = f"x {below} {start}"
    high = f"x {above} {end}"
    forms = [rf"{first} \cup {second}", rf"{second}\cup{first}", rf"{low} \text{{ or }} {high}"]
    forms.append(f"{high} or {low}")
    return rng.choice(forms)


def draw_list(rng: random.Random) -> tuple[int, ...]:
    return tuple(sorted(rng.sample(range(-30, 60), rng.randint(2, 4))))


def write_list(rng: random.Random, value: tuple[int, ...]) -> str:
    numbers = [str(number) for number in rng.sample(value, len(value))]
    forms = [
        ", ".join(numbers),
        rf"\{{{', '.join(numbers)}\}}",
        "; ".join(numbers),
        ", ".join(numbers[:-1]) + rf" \text{{ and }} {numbers[-1]}",
        ", ".join(f"x = {number}" for number in numbers),
        rf"\left\{{{','.join(numbers)}\right\}}",
    ]
    return rng.choice(forms)


def change_list(rng: random.Random, value: tuple[int, ...]) -> tuple[int, ...]:
    fresh = rng.choice([number for number in range(-40, 70) if number not in value])
    changes = [value[1:], (*value, fresh), (*value[:-1], fresh)]
    return tuple(sorted(rng.choice(changes)))


def draw_tuple(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randint(-30, 60) for _ in range(rng.randint(2, 4)))


def write_tuple(rng: random.Random, value: tuple[int, ...]) -> str:
    inner = rng.choice([", ", ",", " , ", r",\ "]).join(str(number) for number in value)
    return rng.choice([f"({inner})", rf"\left({inner}\right)", rf"\bigl({inner}\bigr)"])


def change_tuple(rng: random.Random, value: tuple[int, ...]) -> tuple[int, ...]:
    place = rng.randrange(len(value))
    changed = (*value[:place], value[place] + 1, *value[place + 1 :])
    return rng.choice([value[::-1], changed, value[1:], (*value, 5)])


def draw_measure(rng: random.Random) -> tuple[Any, ...]:
    return rng.randint(1, 900), rng.choice(sorted(UNITS))


def write_measure(rng: random.Random, value: tuple[Any, ...]) -> str:
    name = rng.choice(UNITS[value[1]])
    forms = [rf"\text{{ {name}}}", rf"\ \mathrm{{{name}}}", rf"\,\mathrm{{~{name}}}", f" ({name})"]
    forms.append(rf"\mbox{{ {name}}}")
    return f"{value[0]}{rng.choice(forms)}"


def change_measure(rng: random.Random, value: tuple[Any, ...]) -> tuple[Any, ...]:
    unit = rng.choice([name for name in sorted(UNITS) if name != value[1]])
    return rng.choice([(value[0] + 1, value[1]), (value[0], unit), (value[0] * 10, value[1])])


def draw_polynomial(rng: random.Random) -> tuple[int, int]:
    """(x - a)(x - b)"""
    first = rng.randint(-9, 9)
    second = rng.randint(-9, 9)
    return min(first, second), max(first, second)


def write_polynomial(rng: random.Random, value: tuple[int, int]) -> str:
    a, b = value
    forms = [
        f"x^2{-a - b:+d}x{a * b:+d}",
        f"x^{{2}} {-a - b:+d} x {a * b:+d}",
        f"(x{-a:+d})(x{-b:+d})",
        rf"(x{-b:+d}) \cdot (x{-a:+d})",
        f"x(x{-a - b:+d}){a * b:+d}",
        f"{a * b}{-a - b:+d}x+x^2",
    ]
    return rng.choice(forms)


def change_polynomial(rng: random.Random, value: tuple[int, int]) -> tuple[int, int]:
    a, b = value
    changed = rng.choice([(a + 1, b), (a, b - 1), (-a, b), (-a, -b)])
    return min(changed), max(changed)


KINDS = {
    "number": (draw_number, write_number, change_number),
    "scientific": (draw_scientific, write_scientific, change_scientific),
    "root": (draw_root, write_root, change_root),
    "interval": (draw_interval, write_interval, change_interval),
    "union": (draw_union, write_union, change_interval),
    "list": (draw_list, write_list, change_list),
    "tuple": (draw_tuple, write_tuple, change_tuple),
    "measure": (draw_measure, write_measure, change_measure),
    "polynomial": (draw_polynomial, write_polynomial, change_polynomial),
}
