"""PTX text: what it says, and what is refused with its line."""

import math

import pytest

from .errors import Unsupported
from .parser import entries, parse
from .program import Address, Immediate, Pair, Register, Sink, Special, Symbol, Vector
from .tokens import Tokens, number

TEXT = """//
.version 8.7
.target sm_80
.address_size 64

.extern .shared .align 16 .b8 global_smem[];
.shared .align 4 .b8 flags[12];
.shared .align 8 .b64 clock;

.visible .entry first(
	.param .u64 .ptr .global .align 16 first_param_0,
	.param .u32 first_param_1,
	.param .u64 .ptr .global .align 1 first_param_2,
	.param .align 64 .b8 first_param_3[128],
	.param .u8 first_param_4
)
.reqntid 128, 2, 1
.maxnreg 64
{
	.reg .pred 	%p<3>;
	.reg .b32 	%r<5>, extra;
	.reg .f32 %f1;
	.loc	1 17 0                          // kernel.py:17:0
$L__func_begin0:
	ld.param.b64 	%r1, [first_param_0];  /* a comment
	on two lines */ mov.u32 %r2, %tid.x;
	.loc	2 40 12, function_name $L__info_string0, inlined_at 1 19 8
	@!%p1 bra 	$L__BB0_2;
	// begin inline asm
	{
	.reg .pred %p1;
	wait:
	setp.lt.s32 %p1|_, %r1, -4;
	@%p1 bra wait;
	@%p2 bra done;
	done:
	}
	// end inline asm
	.pragma "nounroll";
$L__BB0_2:
	mov.b64 {%r1, _}, %r2;
	st.shared.v2.b32 [%r1+-8], {%r1, 0f3F800000};
	ld.shared.b32 %r1, [global_smem+16];
	cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%r2, {%r3, 7}], [%r4];
	ret;
}
	.file	1 "/source/kernel.py"
	.file	2 "/usr/lib/standard.py"
.visible .entry second()
{
	ret;
}
"""


@pytest.fixture(scope="module")
def entry():
    return parse(TEXT)


def test_names_and_target(entry):
    assert entries(TEXT) == ["first", "second"] and entry.name == "first"
    assert entry.target == "sm_80" and entry.block == (128, 2, 1) and entry.most_registers == 64
    assert parse(TEXT, "second").code[0].opcode == "ret"


def test_parameters_lie_at_their_alignment(entry):
    """The .align after .ptr is of what the pointer points to."""
    found = [(p.offset, p.size) for p in entry.parameters]
    assert found == [(0, 8), (8, 4), (16, 8), (64, 128), (192, 1)]
    assert entry.parameter_bytes == 193


def test_shared_variables(entry):
    assert entry.dynamic == "global_smem"
    assert [(v.name, v.offset, v.size) for v in entry.shared] == [
        ("flags", 0, 12),
        ("clock", 16, 8),
    ]


def test_a_shared_variable_of_an_entry_is_its_own():
    text = ".shared .b8 of_all[8];\n.entry k() {\n.shared .b8 own[16];\nret; }\n.entry other() { ret; }"
    found = [[v.name for v in parse(text, name).shared] for name in ("k", "other")]
    assert found == [["of_all", "own"], ["of_all"]]


def test_the_dynamic_memory_lies_at_its_alignment(entry):
    assert (entry.dynamic, entry.dynamic_offset) == ("global_smem", 32)  # after 24 bytes
    text = ".extern .shared .align 128 .b8 all[];\n.shared .b8 one[1];\n.entry k() { ret; }"
    assert parse(text).dynamic_offset == 128


def test_registers_of_a_scope_are_its_own(entry):
    assert entry.registers["%r4"] == "b32" and entry.registers["extra"] == "b32"
    compare = next(i for i in entry.code if i.root == "setp")
    inner = compare.operands[0].first
    assert inner != Register("%p1") and entry.registers[inner.name] == "pred"
    assert compare.operands == (Pair(inner, Sink()), Register("%r1"), Immediate(-4))


def test_labels_of_a_scope(entry):
    outer, back, forward = [i for i in entry.code if i.root == "bra"]
    assert outer.negated and outer.guard == Register("%p1")
    assert entry.code[entry.labels[outer.operands[0].name]].opcode == "mov.b64"
    assert entry.code[entry.labels[back.operands[0].name]].root == "setp"
    assert entry.labels[forward.operands[0].name] == entry.labels[outer.operands[0].name]


def test_two_scopes_may_use_the_same_names():
    inner = "{ .reg .b32 x; again: mov.u32 x, %tid.x; { .reg .b32 x; mov.u32 x, 1; } bra again; }"
    entry = parse(f".entry k() {{ {inner} {inner} ret; }}")
    names = [i.operands[0].name for i in entry.code if i.root == "mov"]
    assert len(set(names)) == 4
    assert [entry.labels[i.operands[0].name] for i in entry.code if i.root == "bra"] == [0, 3]


def test_operands(entry):
    code = {i.root: i for i in entry.code}
    assert code["mov"].operands == (Vector((Register("%r1"), Sink())), Register("%r2"))
    assert code["st"].operands == (Address(Register("%r1"), -8), Vector((Register("%r1"), Immediate(1.0))))  # fmt: skip
    assert code["ld"].operands == (Register("%r1"), Address(Symbol("global_smem"), 16))
    assert code["cp"].operands == (
        Address(Register("%r1")),
        Address(Register("%r2"), 0, (Register("%r3"), Immediate(7))),
        Address(Register("%r4")),
    )
    assert code["cp"].modifiers[3:] == ("2d", "shared::cluster", "global", "mbarrier::complete_tx::bytes")  # fmt: skip
    first_move = next(i for i in entry.code if i.opcode == "mov.u32")
    assert first_move.operands == (Register("%r2"), Special("%tid.x"))


def test_places(entry):
    load, move = entry.code[0], entry.code[1]
    assert (load.place.line, load.place.file, load.place.source) == (25, "kernel.py", 17)
    assert move.place.line == 26
    assert str(entry.code[2].place) == "PTX line 28 (standard.py:40)"


@pytest.mark.parametrize("text, value", [
    ("12", 12), ("-7", -7), ("0x1F", 31), ("0x7773U", 0x7773), ("017", 15), ("0b101", 5), ("0", 0),
    ("0f3F800000", 1.0), ("0FBF000000", -0.5), ("0d4000000000000000", 2.0), ("1.5", 1.5),
    ("-2.5e3", -2500.0), ("0f7F800000", math.inf),
])  # fmt: skip
def test_numbers(text, value):
    assert Tokens(text).items[0][:2] == ("number", text)
    assert number(text) == value and type(number(text)) is type(value)


def test_zero_keeps_its_sign():
    assert math.copysign(1, number("0f80000000")) == -1


def body(lines):
    return f".target sm_80\n.entry k()\n{{\n.reg .b32 %r<4>;\n.reg .pred %p<2>;\n{lines}\nret;\n}}"


@pytest.mark.parametrize("lines, said", [
    ("bra nowhere;", "no label 'nowhere'"),
    ("add.s32 %r1, %r2 %r3;", "line 6: expected ','"),
    ("add.s32 %r1, %r2, !%r3;", "line 6: operand !"),
    ("add.s32 %r1, %r2, 1.0e5x;", "line 6"),
    ("mov.b32 %r1, 12ab;", "line 6"),
    ("mov.b32 %r1, 08;", "octal"),
    (".local .b8 depot[16];", "line 6: directive '.local'"),
    (".reg .f8 %q;", "line 6: type '.f8' is not known"),
    ("mov.b32 %r1, `2`;", "line 6: cannot read"),
    ("mov.b32 {%r1 %r2}, %r3;", "line 6: expected ','"),
    ("ld.shared.b32 %r1, [%r2;", "line 6: expected ']'"),
    ("ld.shared.b32 %r1, [%r2+%r3];", "line 6: expected ']' or a whole number"),
    ("ld.shared.b32 %r1, [%r2, 5];", "line 6: expected '{'"),
])  # fmt: skip
def test_what_cannot_be_read_is_refused_with_its_line(lines, said):
    with pytest.raises(Unsupported, match=said.replace("'.", "'\\.").replace("]", "\\]")):
        parse(body(lines))


def test_texts_without_the_entry():
    with pytest.raises(Unsupported, match=r"no \.entry"):
        parse(".version 8.7")
    with pytest.raises(Unsupported, match="no entry 'other'; it has k"):
        parse(body(""), "other")
    with pytest.raises(Unsupported, match="ends inside an entry"):
        parse(body("")[:-1])
