"""The words, numbers and marks of a PTX text."""

import bisect
import re
import struct

from .errors import Unsupported

_TOKEN = re.compile(
    r"(?P<skip>\s+|//[^\n]*|/\*.*?\*/)"
    r"|(?P<number>-?(?:0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|0[bB][01]+U?"
    r"|\d+\.\d+(?:[eE][+-]?\d+)?|\d+U?)(?!\w))"
    r"|(?P<word>[%$]?[A-Za-z_.$][\w.$]*(?:::\w+)*(?:\.\w+(?:::\w+)*)*|%\w+)"
    r"|(?P<string>\"[^\"]*\")"
    r"|(?P<mark>[{}\[\](),;:@!|<>=+-])",
    re.DOTALL,
)


class Tokens:
    """The tokens of a text, one after another, with the line each is on."""

    def __init__(self, text: str, first_line: int = 1):
        self.items: list[tuple[str, str, int]] = []
        ends = [m.start() for m in re.finditer("\n", text)]
        position = 0
        while position < len(text):
            found = _TOKEN.match(text, position)
            line = first_line + bisect.bisect_left(ends, position)
            if found is None:
                raise Unsupported(
                    f"PTX line {line}: cannot read {text[position : position + 20]!r}"
                )
            if found.lastgroup != "skip":
                self.items.append((found.lastgroup, found.group(), line))
            position = found.end()
        self.at = 0

    def peek(self, ahead: int = 0) -> str:
        at = self.at + ahead
        return self.items[at][1] if at < len(self.items) else ""

    def next(self) -> str:
        if self.at >= len(self.items):
            raise Unsupported(f"PTX line {self.line}: the text ends too early")
        self.at += 1
        return self.items[self.at - 1][1]

    @property
    def line(self) -> int:
        if not self.items:
            return 0
        return self.items[min(self.at, len(self.items) - 1)][2]

    def whole(self) -> int:
        """Take a whole number."""
        line, text = self.line, self.next()
        found = number(text) if text[:1].isdigit() or text[:1] == "-" else None
        if not isinstance(found, int):
            raise Unsupported(f"PTX line {line}: expected a whole number, found {text!r}")
        return found

    def separate(self, closing: str) -> bool:
        """Take a comma, or the mark that closes a list. Whether the list goes on."""
        line, found = self.line, self.next()
        if found not in (",", closing):
            raise Unsupported(f"PTX line {line}: expected ',' or {closing!r}, found {found!r}")
        return found == ","

    def expect(self, wanted: str) -> None:
        line, found = self.line, self.next()
        if found != wanted:
            raise Unsupported(f"PTX line {line}: expected {wanted!r}, found {found!r}")


def number(text: str) -> int | float:
    """A number as PTX writes it: ``0f`` and ``0d`` are the bits of a float, a leading 0 is octal."""
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text)
    if digits[:2].lower() == "0f":
        return sign * struct.unpack(">f", bytes.fromhex(digits[2:]))[0]
    if digits[:2].lower() == "0d":
        return sign * struct.unpack(">d", bytes.fromhex(digits[2:]))[0]
    if "." in digits:
        return sign * float(digits)
    digits = digits.rstrip("U")
    octal = len(digits) > 1 and digits.isdigit() and digits[0] == "0"
    if octal and set(digits) & {"8", "9"}:
        raise Unsupported(f"{text!r} is no number: a leading 0 is octal")
    return sign * int(digits, 8 if octal else 0)
