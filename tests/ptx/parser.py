"""PTX text to a ``program.Entry``. What is not known is an error that names the line."""

import re
from dataclasses import replace
from pathlib import PurePath

from .declarations import check_names, known_type, read_parameter, read_parameters, read_shared
from .errors import Unsupported
from .functions import Part, definitions, link
from .program import (
    Address,
    Entry,
    Function,
    Immediate,
    Instruction,
    Operand,
    Pair,
    Place,
    Register,
    Sink,
    Special,
    Symbol,
    Variable,
    Vector,
)  # fmt: skip
from .tokens import Tokens, number

_SPECIAL = re.compile(
    r"%(?:n?tid|n?ctaid|clusterid|nclusterid|cluster_n?ctaid)\.[xyz]$"
    r"|%(?:laneid|warpid|cluster_n?ctarank|is_explicit_cluster|lanemask_\w+)$"
)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)")
_IGNORED = {".pragma", ".maxntid", ".minnctapersm"}
_BARE = {".noinline", ".noreturn"}
_INDIRECT = {".callprototype", ".calltargets", ".branchtargets"}
_LOCATED = {"function_name": 1, "inlined_at": 3}  # words of a .loc, and the words after each
_MOST_REGISTERS = 1 << 17  # of an entry: there is an array for each


def entries(text: str) -> list[str]:
    """The names of the kernels in a text."""
    return _ENTRY.findall(text)


def parse(text: str, name: str | None = None) -> Entry:
    """One kernel of a text; the first without a name."""
    starts = {m.group(1): m for m in _ENTRY.finditer(text)}
    if not starts:
        raise Unsupported("the PTX has no .entry")
    name = name if name is not None else next(iter(starts))
    if name not in starts:
        raise Unsupported(f"the PTX has no entry {name!r}; it has {', '.join(starts)}")
    start = starts[name].start()
    target = re.search(r"^\.target\s+(\w+)", text, re.MULTILINE)
    entry = Entry(name, target.group(1) if target else "")
    for found in re.finditer(r"^(?:\.extern )?\.shared [^;]*;", text, re.MULTILINE):
        before = text[: found.start()]
        if before.count("{") == before.count("}"):  # not in an entry, which reads its own
            read_shared(Tokens(found.group(), 1 + before.count("\n")), entry)
    listed = re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.MULTILINE)
    files = {int(number): PurePath(path).name for number, path in listed}
    functions = definitions(text)

    def read(at: int, function: str = "") -> Part:
        tokens = Tokens(text[at : _end_of(text, at)], 1 + text.count("\n", 0, at))
        part = _Reader(tokens, entry, files, function).read()
        check_names(entry, part)
        return part

    link(
        entry, read(start), lambda name: read(functions[name], name) if name in functions else None
    )
    return entry


def _end_of(text: str, start: int) -> int:
    """Where the body of the entry or of the function at ``start`` closes."""
    depth = 0
    for found in re.compile(r"//[^\n]*|[{}]").finditer(text, start):
        depth += {"{": 1, "}": -1}.get(found.group(), 0)
        if depth == 0 and found.group() == "}":
            return found.end()
    raise Unsupported("the PTX ends inside an entry")


class _Reader:
    """Reads the parameters and the body of one entry, or of a function that it calls, whose names
    all become unique ones."""

    def __init__(self, tokens: Tokens, entry: Entry, files: dict[int, str], function: str = ""):
        self.tokens, self.entry, self.files = tokens, entry, files
        self.part = Part(function=Function(function) if function else None)
        # names of an inner scope, to unique ones; a function is in a scope that has no names
        self.scopes: list[dict[str, str]] = [{}] if function else []
        self.starts: list[int] = [0] if function else []  # the pc at which each scope opened
        self.declared = 0
        self.file, self.source = "", 0

    def read(self) -> Part:
        outside = len(self.scopes)
        self._open()
        self._head()
        while self.tokens.peek() != "{":
            self._directive(self.tokens.next())
        self.tokens.next()
        while len(self.scopes) > outside:
            self._statement()
        return self.part

    def _head(self) -> None:
        """``.entry name (parameters)`` or ``.func (result) name (parameters)``"""
        tokens, function = self.tokens, self.part.function
        tokens.next()
        if function is not None and tokens.peek() == "(":
            function.results += map(self._pass, read_parameters(tokens))
        tokens.next()
        found = read_parameters(tokens) if tokens.peek() == "(" else []
        if function is None:
            self.entry.parameters += found
        else:
            function.parameters += map(self._pass, found)

    def _pass(self, variable: Variable) -> Variable:
        """A ``.param`` variable with a unique name and a place in a thread's memory."""
        start = -(-self.entry.passed_bytes // variable.align) * variable.align
        name = self._declare(variable.name)
        self.entry.passed.append(replace(variable, name=name, offset=start))
        return self.entry.passed[-1]

    def _directive(self, word: str) -> None:
        tokens = self.tokens
        if word == ".reqntid":
            self.entry.block = (*self._numbers(), 1, 1)[:3]
        elif word == ".maxnreg":
            self.entry.most_registers = self._numbers()[0]
        elif word in _BARE:
            return
        elif word in _INDIRECT:
            raise Unsupported(f"PTX line {tokens.line}: {word}: an indirect call is not known")
        elif word in _IGNORED:
            if word == ".pragma":
                tokens.next()
                tokens.expect(";")
            else:
                self._numbers()
        else:
            raise Unsupported(f"PTX line {tokens.line}: directive {word!r} is not known")

    def _numbers(self) -> list[int]:
        found = [self.tokens.whole()]
        while self.tokens.peek() == ",":
            self.tokens.next()
            found.append(self.tokens.whole())
        return found

    def _open(self) -> None:
        self.scopes.append({})
        self.starts.append(len(self.part.code))

    def _close(self) -> None:
        """End a scope. Jumps in it to a label that came after them now get the label's unique name."""
        scope, start = self.scopes.pop(), self.starts.pop()
        code = self.part.code
        for n in range(start, len(code) if self.scopes else start):
            target = code[n].operands[:1] if code[n].root == "bra" else ()
            name = target[0].name if target and isinstance(target[0], Symbol) else ""
            if scope.get(name, name) != name:
                code[n] = replace(code[n], operands=(Symbol(scope[name]),))

    def _statement(self) -> None:
        tokens = self.tokens
        word = tokens.peek()
        if word == "{":
            tokens.next()
            self._open()
        elif word == "}":
            tokens.next()
            self._close()
        elif word == ".reg":
            self._registers()
        elif word == ".loc":
            self._location()
        elif word == ".shared":
            read_shared(tokens, self.entry)
        elif word == ".param":
            self._pass(read_parameter(tokens))
            tokens.expect(";")
        elif word.startswith("."):
            self._directive(tokens.next())
        elif tokens.peek(1) == ":":
            self.part.labels[self._declare(tokens.next())] = len(self.part.code)
            tokens.next()
        elif word == ";":
            tokens.next()
        else:
            self._instruction()

    def _location(self) -> None:
        tokens = self.tokens
        tokens.next()
        self.file = self.files.get(tokens.whole(), "")
        self.source = tokens.whole()
        tokens.whole()
        while tokens.peek() == ",":  # , function_name $name, inlined_at file line column
            tokens.next()
            line, word = tokens.line, tokens.next()
            if word not in _LOCATED:
                raise Unsupported(f"PTX line {line}: {word!r} of a .loc is not known")
            for _ in range(_LOCATED[word]):
                tokens.next()
            if tokens.peek() == "+":
                tokens.next(), tokens.next()

    def _declare(self, name: str) -> str:
        """The unique name of what is declared in the innermost scope."""
        if name in self.scopes[-1]:
            raise Unsupported(f"PTX line {self.tokens.line}: {name!r} is declared twice")
        self.declared += 1
        of = f"@{self.part.function.name}" if self.part.function else ""
        unique = name if len(self.scopes) == 1 else f"{name}@{self.declared}{of}"
        self.scopes[-1][name] = unique
        return unique

    def _registers(self) -> None:
        tokens = self.tokens
        tokens.next()
        type_ = known_type(tokens.next(), tokens)
        while True:
            name = tokens.next()
            if tokens.peek() == "<":
                tokens.next()
                names = [f"{name}{n}" for n in range(self._register_count())]
                tokens.expect(">")
            else:
                names = [name]
            self.part.registers.update(dict.fromkeys(map(self._declare, names), type_))
            if tokens.next() == ";":
                return

    def _register_count(self) -> int:
        count = self.tokens.whole()
        if len(self.part.registers) + count > _MOST_REGISTERS:
            raise Unsupported(
                f"PTX line {self.tokens.line}: more than {_MOST_REGISTERS} registers are declared"
            )
        return count

    def _resolve(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def _instruction(self) -> None:
        tokens = self.tokens
        start, line = tokens.at, tokens.line
        guard, negated = None, False
        if tokens.peek() == "@":
            tokens.next()
            if tokens.peek() == "!":
                tokens.next()
                negated = True
            guard = Register(self._resolve(tokens.next()))
        root, *modifiers = tokens.next().split(".")
        operands, read = [], self._passed if root == "call" else self._operand
        if tokens.peek() == ";":
            tokens.next()
        else:
            operands.append(read())
            while tokens.separate(";"):
                operands.append(read())
        text = " ".join(item[1] for item in tokens.items[start : tokens.at - 1])
        place = Place(line, self.file, self.source)
        if root == "ret" and self.part.function:  # what it returns from
            operands = [Symbol(self.part.function.name)]
        self.part.code.append(
            Instruction(root, tuple(modifiers), tuple(operands), place, text, guard, negated)
        )

    def _passed(self) -> Operand:
        """An operand of a call: variables in parentheses, or a name."""
        if self.tokens.peek() == "(":
            return Vector(self._listed("(", ")"))
        return self._atom()

    def _operand(self) -> Operand:
        tokens = self.tokens
        if tokens.peek() == "{":
            return Vector(self._listed("{", "}"))
        if tokens.peek() == "[":
            return self._address()
        first = self._atom()
        if tokens.peek() == "|":
            tokens.next()
            return Pair(first, self._atom())
        return first

    def _listed(self, opening: str, closing: str) -> tuple[Operand, ...]:
        tokens, found = self.tokens, []
        tokens.expect(opening)
        found.append(self._atom())
        while tokens.separate(closing):
            found.append(self._atom())
        return tuple(found)

    def _address(self) -> Address:
        tokens = self.tokens
        tokens.expect("[")
        base, offset, coordinates = self._atom(), 0, ()
        if tokens.peek() not in ("]", ","):  # [base+4], [base+-4], [base-4]
            if tokens.peek() == "+":
                tokens.next()
            offset = self._offset()
        if tokens.peek() == ",":
            tokens.next()
            coordinates = self._listed("{", "}")
        tokens.expect("]")
        return Address(base, offset, coordinates)

    def _offset(self) -> int:
        kind, word, line = self.tokens.items[self.tokens.at]
        found = number(word) if kind == "number" else None
        if not isinstance(found, int):
            raise Unsupported(f"PTX line {line}: expected ']' or a whole number, found {word!r}")
        self.tokens.next()
        return found

    def _atom(self) -> Operand:
        tokens = self.tokens
        kind, word, line = tokens.items[tokens.at]
        tokens.next()
        if word in ("!", "-"):
            raise Unsupported(f"PTX line {line}: operand {word}{tokens.peek()} is not known")
        if kind == "number":
            return Immediate(number(word))
        if word == "_":
            return Sink()
        if _SPECIAL.match(word):
            return Special(word)
        name = self._resolve(word)
        return Register(name) if name in self.part.registers else Symbol(name)
