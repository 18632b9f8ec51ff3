r"""Plain numbers with a unit: `8,000`, `-3.0`, `\$5.50`, `20\%`, `4.5e33`, `15 \text{ cm}^2`, `2
million`, `6:00 a.m.`

Exact, and without any mathematics: what is no plain number is left to kit/grading/expressions.py. A
unit counts only where both sides have one that is known, and they differ.
"""

import re
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
mph milesperhour miles/hour
km/h kmh kph kilometersperhour
m/s meterspersecond
dollar dollars usd bucks
cent cents
euro euros
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
parsec parsecs"""
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
# Words after a number that make it another one, or no answer.
_NOT_UNITS = set(
    "a an and or if is not no nor to plus minus half dozen quarter third over mod more less fewer "
    "least most than between except but else when where with without maybe about squared cubed "
    "incorrect wrong base remainder choose factorial sqrt pi "
    "sin cos tan cot sec csc log ln exp lim gcd lcm true false am pm".split()
)
_NUMBER = re.compile(
    r"([-+]?)\s*(\d{1,3}(?:,\d{3})+(?!\d)|\d*)(?:\.(\d*))?"
    r"(?:\s*\\(?:times|cdot)\s*10\s*\^\s*\{?\s*([-+]?\d{1,4})\s*\}?(?!\d))?(.*)",
    re.DOTALL,
)
_UNIT = re.compile(r"(?:[^\W\d_]|[\s/.,°%'·]|\^\s?-?[23])+")
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
        text = text.rsplit("=", 1)[-1].strip()
    match = _NUMBER.fullmatch(text)
    if match is None or not (match[2] or match[3]):
        return None
    unit = read_unit(match[5], words)
    if unit is None:
        return None
    whole = match[2].replace(",", "")
    fraction = match[3] or ""
    value = Fraction(f"{match[1]}{whole or 0}.{fraction or 0}") * Fraction(10) ** int(match[4] or 0)
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
    # without fonts and brackets
    in_font = bool(re.search(rf"\\{FONTS}", text))
    unit = re.sub(rf"\\{FONTS}(?![a-zA-Z])", " ", text).replace("\\%", "%")
    unit = re.sub(r"[{}()\s-]+", " ", unit).strip(" .,")
    if text.count("(") != text.count(")") or (not unit and "(" in text):
        return None
    if unit in ("", "%"):
        return unit
    # words, apart from those that make another number of it
    unit = unit.lower()
    names = re.findall(r"[^\W\d_]+", unit)
    if not _UNIT.fullmatch(unit) or not 1 <= len(names) <= 8 or _NOT_UNITS.intersection(names):
        return None
    # a letter or two may be variables: they need a font, or a place among the known units
    long_enough = any(len(name) >= 3 or not name.isascii() for name in names)
    is_set_off = (words or len(unit) > 1) and text[:1] in (" ", "-")
    if in_font or long_enough or _is_known(unit, is_set_off):
        return unit
    return None


def _is_known(unit: str, is_set_off: bool) -> bool:
    """Whether a unit is one of ours, or one for each of another: `km/h`."""
    if is_set_off and unit.replace(" ", "").split("^")[0] in UNITS:
        return True
    return "/" in unit and all(part.strip(" ^23") in UNITS for part in unit.split("/"))


def read_clock(text: str) -> tuple[int, int, str] | None:
    """Hours, minutes, a or p: of a time of day with am or pm; None for anything else."""
    match = _CLOCK.fullmatch(re.sub(rf"\\{FONTS}|[{{}}]", "", text).strip())
    return (int(match[1]), int(match[2] or 0), match[3].lower()) if match else None


def different_units(first: str, second: str) -> bool:
    """Whether both units are known, and differ."""
    names = [re.split(r"\^", unit)[0] for unit in (first, second)]
    return names[0] != names[1] and all(name in UNITS.values() for name in names)
