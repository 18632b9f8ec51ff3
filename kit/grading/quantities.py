r"""Plain numbers with a unit: `8,000`, `-3.0`, `\$5.50`, `20\%`, `4.5e33`, `15 \text{ cm}^2`, `2
million`, `6:00 a.m.`

Exact, and without any mathematics: what is no plain number is left to kit/grading/expressions.py. A
unit counts only where both sides have one that is known, and they differ.
"""

import re
from collections import defaultdict
from fractions import Fraction
from typing import NamedTuple

from kit.grading.normalize import FONTS

# One line for each unit: its names.
_UNITS = """mm millimeter millimeters
cm centimeter centimeters centimetre centimetres
m meter meters metre metres
km kilometer kilometers kilometre kilometres
in inch inches
ft foot feet
yd yard yards
mi mile miles
mg milligram milligrams
g gram grams
kg kilogram kilograms
lb lbs pound pounds
oz ounce ounces
ml milliliter milliliters
l liter liters litre litres
s sec secs second seconds
min mins minute minutes
h hr hrs hour hours
day days
week weeks
month months
year years
mi/h mph
km/h kmh kph
dollar dollars usd bucks
cent cents
euro euros
yen
degree degrees °
radian radians rad
n newton newtons
j joule joules
kj kilojoule kilojoules
w watt watts
kw kilowatt kilowatts
v volt volts
hz hertz
pa pascal pascals
ohm ohms
amp ampere amperes amps
coulomb coulombs
kelvin kelvins
mol mole moles
erg ergs
parsec parsecs
acre acres
ton tons tonne tonnes
ev electronvolt electronvolts
byte bytes
kpa
kwh
khz
mhz
ghz
kev
mev
gev
yr yrs
rpm
psi
tbsp tablespoon tablespoons
tsp teaspoon teaspoons
pcs pieces"""
UNITS = {name: line.split()[0] for line in _UNITS.splitlines() for name in line.split()}
_SCALES = {
    "hundred": 2,
    "thousand": 3,
    "million": 6,
    "billion": 9,
    "trillion": 12,
    "万": 4,
    "亿": 8,
}
# Words after a number that make it another one, in either number (3 quarters may be coins).
_FACTORS = set(
    "half halve dozen third fifth sixth seventh eighth ninth tenth hundredth thousandth lakh "
    "crore".split()
)
# Words that make it another one, or no answer.
_NOT_UNITS = set(
    "quarter a an and or if is not no nor to plus minus over mod more less fewer below "
    "least most than between except but else when where with without maybe about squared cubed "
    "incorrect wrong base remainder choose factorial sqrt pi "
    "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan arg det log ln exp lim gcd lcm "
    "alpha beta gamma delta epsilon theta lambda mu nu xi rho sigma tau phi chi psi omega "
    "unless doubled tripled multiplied increased decreased "
    "true false am pm".split()
)
# 3 twelfths, 2 millionths; 5 divided by, 5 point six, 5 times the radius, but 5 times a day
_OPERATION = re.compile(
    r"(?:divided|through)\b|point (?:zero|one|two|three|four|five|six|seven|eight|nine)\b|"
    r"times (?:the|\w)\b|"
    r"(?:eleven|twelf|(?:thir|four|fif|six|seven|eigh|nine)teen|\w+tie|million|billion|trillion)"
    r"ths?\b"
)
_FUNCTIONS = re.compile("sin|cos|tan|sqrt|log|ln|exp|arc|alpha|beta|theta")
_NUMBER = re.compile(
    r"([-+]?)\s*(\d{1,3}(?:,\d{3})+(?!\d)|\d*)(?:\.(\d*))?"
    r"(?:\s*\\(?:times|cdot)\s*10\s*\^\s*\{?\s*([-+]?\d{1,4})\s*\}?(?!\d))?(.*)",
    re.DOTALL,
)
# The answer ends within a unit, or a variable follows it: 5 \text{cm} x
_NO_UNIT = re.compile(rf"(?:-|\\cdot|\\times|/)\s*$|\\{FONTS}\s*\{{[^{{}}]*\}}\s*[a-z](?![a-zA-Z])")
_UNIT = re.compile(r"(?:[^\W\d_]|[\s/.,°%'·]|\^\s?[1-9])+")
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
# k before a metre, and so on: of which units there are multiples
_MULTIPLE = re.compile(r"[nμumckgt](?:m|s|w|v|j|pa|n|hz|ev|b|l|a|mol|g)")
_CURRENCIES = {"\\$": "dollars", "$": "dollars", "€": "euros", "£": "pounds", "¥": "yen"}
_AMOUNT = re.compile(r"(-?)\s*(\\\$|[$€£¥])\s*(-?\d[\d.,]*)|(-?\d[\d.,]*)\s*([€£¥])")
_CLOCK = re.compile(r"(\d{1,2})(?::(\d\d))?\s*([ap])\.?\s*m\.?", re.IGNORECASE)


class Quantity(NamedTuple):
    """A number as it is written."""

    value: Fraction
    percent: bool
    unit: str  # its shortest name; as written where it is not known; "": none
    digits: int  # significant ones
    places: int  # decimals


def read_quantity(text: str, words: bool = False) -> Quantity | None:
    """The number and unit of a normal form; None where it is anything else.

    Args:
        words: grade-school answers: what comes before the last `=` and the unit's spelling do not
            matter.
    """
    if words:
        text = after_last_equals(text)
    match = _NUMBER.fullmatch(text)
    if match is None or not (match[2] or match[3]):
        return None
    unit = read_unit(match[5], words)
    if unit is None:
        return None
    whole = match[2].replace(",", "")
    fraction = match[3] or ""
    value = Fraction(f"{match[1]}{whole or 0}.{fraction or 0}e{match[4] or 0}")
    scale, _, rest = unit.partition(" ")
    if scale in _SCALES:
        value *= 10 ** _SCALES[scale]
        unit = rest
    percent = unit in ("%", "percent")
    return Quantity(
        value=value,
        percent=percent,
        unit="" if percent else UNITS.get(unit.replace(" ", ""), unit),
        digits=len((whole + fraction).lstrip("0")),
        places=len(fraction),
    )


def read_unit(text: str, words: bool = False) -> str | None:
    """The unit after a number, in lower case; "" for none, None where the text is no unit.

    Args:
        words: a single letter without a font of its own is a unit, not a variable.
    """
    unit = _plain_unit(text)
    is_balanced = all(text.count(a) == text.count(b) for a, b in ("()", "{}"))
    if not is_balanced or (not unit and "(" in text) or _NO_UNIT.search(text):
        return None
    if unit in ("", "%"):
        return unit
    # words, apart from those that make another number of it
    names = re.findall(r"[^\W\d_]+", unit)
    if not _UNIT.fullmatch(unit) or not 1 <= len(names) <= 8 or _makes_another(names):
        return None
    # letters may be variables: they need a font, the look of a word, or a place among known units
    if re.search(rf"\\{FONTS}", text) or _is_apart(text, names, words):
        return unit
    is_set_off = text[:1] in (" ", "-") and (words or len(unit) > 1)
    return unit if _is_known(unit, is_set_off) else None


def _is_apart(text: str, names: list[str], words: bool) -> bool:
    """Whether what follows a number are words, and no factors of a product."""
    is_set_off = words or text[:1] in (" ", "-", "(") or not names[0].isascii()
    # 5apples, but not 5sinhx
    is_long = len(names[0]) > 4 and not _FUNCTIONS.match(names[0])
    return (is_set_off or is_long) and any(_is_word(name, words) for name in names)


def _plain_unit(text: str) -> str:
    """A unit in lower case, without fonts and brackets; s^{-1} is one per s."""
    unit = re.sub(rf"\\{FONTS}(?![a-zA-Z])|\\cdot", " ", text).replace("\\%", "%")
    unit = re.sub(r"([a-zA-Z]+)[\s}]*\^\s*\{?\s*-\s*(\d)\}?", r"/\1^\2", unit)
    # 5-inch, 18-year-old: but 5 cm - x has a sign
    unit = re.sub(
        r"(?:^|(?<=\{))-(?=[a-zA-Z])|(?<=[a-zA-Z])-(?=[a-zA-Z]{2}|[mhsKJNWC](?![a-zA-Z]))",
        " ",
        unit,
    )
    return re.sub(r"[{}()\s]+", " ", unit).strip(" .,").lower()


def _makes_another(names: list[str]) -> bool:
    """Whether a word after a number makes another number of it: 3 fifths, 5 millions."""
    # but third graders are counted
    factor = names[0].removesuffix("s")
    if factor in _FACTORS and (
        len(names) == 1 or factor != names[0] or factor in ("half", "dozen")
    ):
        return True
    if _NOT_UNITS.intersection(names) or _OPERATION.match(" ".join(names)):
        return True
    # 5 million dollars, but not 5 millions, nor 5 dollars million
    if names[0] in _SCALES:
        names = names[1:]
    return any(name.removesuffix("s") in _SCALES for name in names)


def _is_word(name: str, any_letters: bool) -> bool:
    """Whether letters are a word and no product: men and cups, but not abc or xyz."""
    if any_letters or not name.isascii():
        return len(name) > 2 or not name.isascii()
    return bool(re.fullmatch(r"\w[aeiou]\w|(?=.*[aeiou])\w{4,}", name))


def _is_known(unit: str, is_set_off: bool) -> bool:
    """Whether a unit is one of ours, or one for each of another: `km/h`."""
    name = unit.replace(" ", "").split("^")[0]
    if name in UNITS and (is_set_off or len(name) > 2):
        return True
    parts = [part.strip(" ^123456789") for part in unit.split("/")]
    return len(parts) > 1 and all(part in UNITS for part in parts if part)


def after_last_equals(text: str) -> str:
    """What comes after the last `=`; all of it where there are several answers before."""
    before, _, last = text.rpartition("=")
    is_several = re.search(r"(?<!\d),|,(?!\d{3})|;|\\(?:and|or)(?![a-zA-Z])", before)
    return text if is_several else last.strip()


def with_currency(text: str, plain: bool) -> str:
    r"""An amount of money with its currency as a word: `\$18` is `18 \text{dollars}`. All else as
    it is.

    Args:
        plain: a text without mathematics, in which a bare `$` is money and no sign of math mode.
    """
    match = _AMOUNT.fullmatch(text.strip())
    if match is None or (match[2] == "$" and not plain):
        return text
    number = f"{match[1]}{match[3]}" if match[3] else match[4]
    return f"{number} \\text{{{_CURRENCIES[match[2] or match[5]]}}}"


def read_clock(text: str) -> tuple[int, int, str] | None:
    """Hours, minutes, a or p: of a time of day with am or pm; None for anything else."""
    match = _CLOCK.fullmatch(re.sub(rf"\\{FONTS}|[{{}}]", "", text).strip())
    return (int(match[1]), int(match[2] or 0), match[3].lower()) if match else None


def different_units(first: str, second: str) -> bool:
    """Whether both units are known, and differ."""
    known = [_factors(unit) for unit in (first, second)]
    return bool(known[0] and known[1] and known[0] != known[1])


def _factors(unit: str) -> dict[str, int] | None:
    """The exponent of each known unit: {"km": 1, "h": -1}; None where one is not known."""
    factors: dict[str, int] = defaultdict(int)
    sign = 1
    power = 1
    for name, exponent in re.findall(r"([^\W\d_]+|/)(?:\s*\^\s*(\d))?", unit):
        if name in ("/", "per"):
            sign = -1
            continue
        if name in _POWERS:
            power = _POWERS[name]
            continue
        known = UNITS.get(name) or (name if _MULTIPLE.fullmatch(name) else None)
        if known is None:
            return None
        for number, part in enumerate(known.split("/")):
            side = -sign if number else sign
            factors[part] += side * int(exponent or power)
        sign = power = 1
    return factors
