"""Functions, ``.func``: calls, results, threads that part and meet again, and what is refused."""

import re

import numpy as np
import pytest

from .errors import BadAccess, Unsupported
from .machine import EARLY, LATE, Mode
from .programs import WORD_OF_THREAD, execute

MODES = pytest.mark.parametrize("mode", [EARLY, LATE, Mode(shuffled=True, seed=4)])


def call(name: str, to: str, *given: str, guard: str = "", form: str = "call.uni") -> str:
    """A call as nvcc writes it; without ``to`` the function has no result."""
    said = "".join(f".param .b32 param{n};\nst.param.b32 [param{n}+0], {value};\n"
                   for n, value in enumerate(given))  # fmt: skip
    names = ", ".join(f"param{n}" for n in range(len(given)))
    parts = ["(retval0)"] * bool(to) + [name] + [f"(\n{names}\n)"] * bool(given)
    result = ".param .b32 retval0;\n" if to else ""
    taken = f"ld.param.b32 {to}, [retval0+0];\n" if to else ""
    return f"{{ // callseq\n{said}{result}{guard} {form} {', '.join(parts)};\n{taken}}}\n"


# the sum of n + 1 times x; from the loop where it is above 100
SUM = """
.func (.param .b32 result) sum(
.param .b32 sum_param_0,
.param .b32 sum_param_1
)
.noinline
{
.reg .pred %p<3>;
.reg .b32 %r<5>;
ld.param.u32 %r1, [sum_param_0];
ld.param.u32 %r2, [sum_param_1];
mov.u32 %r3, %r1;
LOOP:
st.param.b32 [result+0], %r3;
setp.eq.u32 %p1, %r2, 0;
@%p1 bra END;
add.u32 %r3, %r3, %r1;
sub.u32 %r2, %r2, 1;
setp.gt.u32 %p2, %r3, 100;
@%p2 ret;
bra.uni LOOP;
END:
ret;
}
"""
# sum(x, 3) - sum(x + 1, 2); it stands before what it calls, as declared
BOTH = f"""
.func (.param .b32 result) sum(.param .b32 a, .param .b32 b);
.visible .func (.param .b32 result) both(.param .b32 both_param_0)
{{
.reg .b32 %r<5>;
ld.param.u32 %r1, [both_param_0];
add.u32 %r2, %r1, 1;
{call("sum", "%r3", "%r1", "3")}
{call("sum", "%r4", "%r2", "2", form="call")}
sub.u32 %r3, %r3, %r4;
st.param.b32 [result+0], %r3;
ret;
}}
"""
# adds a number to the word of a thread
KEEP = """
.func keep(.param .b64 keep_param_0, .param .b32 keep_param_1)
{
.reg .b32 %r<3>; .reg .b64 %rd<2>;
ld.param.u64 %rd1, [keep_param_0];
ld.param.u8 %r1, [keep_param_1];
ld.global.u32 %r2, [%rd1];
add.u32 %r2, %r2, %r1;
st.global.u32 [%rd1], %r2;
ret;
}
"""
WRITE = "st.global.u32 [%rd1], %r10;\n"


def results(body: str, functions: str, mode: Mode = EARLY, threads: int = 64, **kwargs):
    """What each thread wrote to its word, which was 5; and the counts."""
    out = np.full(threads, 5, np.uint32)
    counts = execute(WORD_OF_THREAD + body, out, threads=threads, mode=mode, functions=functions,
                     **kwargs)  # fmt: skip
    return out.astype(np.int64), counts


def sum_of(x: np.ndarray, n: np.ndarray) -> np.ndarray:
    """What the loop of ``sum`` leaves: the sum before the one that is above 100."""
    x, n = np.broadcast_arrays(x, n)
    most = np.where(x > 0, np.maximum(100 // np.maximum(x, 1), 1), 1 << 30)
    return x * np.minimum(n + 1, most)


@MODES
def test_a_function_with_a_loop_that_returns_from_the_middle(mode):
    found, _ = results(call("sum", "%r10", "%r1", "%r1") + WRITE, SUM, mode)
    t = np.arange(64)
    assert (found == sum_of(t, t)).all()


@MODES
def test_a_function_that_calls_another_twice(mode):
    found, _ = results(call("both", "%r10", "%r1") + WRITE, BOTH + SUM, mode)
    t = np.arange(64)
    assert (found == (sum_of(t, 3) - sum_of(t + 1, 2)) % 2**32).all()


PARTED = f"""
and.b32 %r5, %r1, 1;
setp.eq.u32 %p1, %r5, 0;
@%p1 bra EVEN;
{call("both", "%r10", "%r1")}
bra.uni MEET;
EVEN:
{call("sum", "%r10", "%r1", "7")}
MEET:
activemask.b32 %r6;
xor.b32 %r10, %r10, %r6;
{WRITE}
"""


@MODES
def test_threads_that_part_call_and_meet_again(mode):
    found, counts = results(PARTED, SUM + BOTH, mode)
    t = np.arange(64)
    wanted = np.where(t % 2, sum_of(t, 3) - sum_of(t + 1, 2), sum_of(t, 7)) % 2**32
    assert (found == wanted ^ 0xFFFFFFFF).all()  # all lanes are there where they meet
    assert counts.instructions[-2] == 2  # the store: each warp executes it once


@MODES
def test_a_call_under_a_guard(mode):
    body = "setp.lt.u32 %p1, %r1, 40;\nmov.u32 %r10, 3;\n" + WRITE
    body += call("keep", "", "%r1", "%r1", guard="@%p1").replace(
        ".param .b32 param0;\nst.param.b32 [param0+0], %r1", ".param .b64 param0;\nst.param.b64 [param0+0], %rd1"
    )  # fmt: skip
    found, _ = results(body, KEEP, mode)
    t = np.arange(64)
    assert (found == np.where(t < 40, 3 + t, 3)).all()


def test_an_exit_in_a_function_ends_the_thread():
    functions = SUM.replace("@%p2 ret;", "@%p2 exit;")
    found, _ = results(call("sum", "%r10", "%r1", "9") + WRITE, functions)
    t = np.arange(64)
    assert (found == np.where(t * 10 > 100, 5, t * 10)).all()


@pytest.mark.parametrize("before", ["", PARTED.split("activemask")[0]], ids=["at once", "parted"])
@MODES
def test_a_warp_is_whole_in_a_function_that_all_its_threads_call(before, mode):
    """``shfl`` needs the whole warp, also after a part of it was in a function alone."""
    other = SUM.replace("sum", "other").replace(
        "LOOP:", "shfl.sync.bfly.b32 %r3, %r3, 1, 31, -1;\nLOOP:", 1
    )
    body = before + call("other", "%r10", "%r1", "0") + WRITE
    assert (results(body, other + SUM + BOTH, mode)[0] == np.arange(64) ^ 1).all()


STRUCTURE = """
.func (.param .align 8 .b8 result[16]) pair(.param .align 8 .b8 given[16])
{
.reg .b32 %r<4>; .reg .b64 %rd<2>;
ld.param.v2.u32 {%r1, %r2}, [given+0];
ld.param.u64 %rd1, [given+8];
st.param.u64 [result], %rd1;
st.param.v2.b32 [result+8], {%r2, %r1};
ret;
}
"""
PASS = """
.param .align 8 .b8 param0[16];
st.param.b32 [param0+0], %r1;
st.param.b32 [param0+4], 7;
st.param.b64 [param0+8], 30;
.param .align 8 .b8 retval0[16];
call.uni (retval0), pair, (param0);
ld.param.u32 %r10, [retval0+{at}];
"""


@pytest.mark.parametrize("at, wanted", [(0, 30), (4, 0), (8, 7), (12, None)])
def test_structures_by_value(at, wanted):
    found, _ = results(PASS.format(at=at) + WRITE, STRUCTURE)
    assert (found == (np.arange(64) if wanted is None else wanted)).all()


def test_what_nobody_passed_has_all_bits_set():
    body = call("sum", "%r10", "%r1", "0").replace("st.param.b32 [param0+0], %r1;\n", "")
    assert (results(body + WRITE, SUM)[0] == 2**32 - 1).all()


@pytest.mark.parametrize("at, said", [(16, "bytes 16 to 20 of 16 bytes of retval0"),
                                      (-4, "bytes -4 to 0 of 16"), (6, "bytes 6 to 10")])  # fmt: skip
def test_accesses_outside_a_variable(at, said):
    with pytest.raises(BadAccess, match=rf"^PTX line \d+: ld\.param.*\n.*{re.escape(said)}"):
        results(PASS.format(at=at).replace("+-", "-"), STRUCTURE)


SELF = SUM.replace("END:\n", "END:\n" + call("{name}", "%r3", "%r3", "%r3"))
CALL = call("sum", "%r10", "%r1", "1")


@pytest.mark.parametrize("body, functions, said", [
    (CALL, SELF.replace("{name}", "sum"), r"call\.uni.*\n.*'sum' calls itself: recursion is not known"),
    (CALL, SELF.replace("{name}", "other") + SELF.replace("sum", "other").replace("{name}", "sum"),
     "'sum' calls itself: recursion is not known"),
    (CALL, "", "function 'sum' has no body in this text"),
    (CALL, ".extern .func (.param .b32 r) sum(.param .b32 a, .param .b32 b);", "has no body"),
    (CALL.replace("sum", "%rd1").replace(";\nld", ", prototype_0;\nld"), SUM, "an indirect call"),
    ("prototype_0 : .callprototype (.param .b32 _) _ (.param .b32 _);", SUM, r"\.callprototype: an indirect"),
    (call("sum", "%r10", "%r1"), SUM, r"variables of \[4\] bytes, the function of \[4, 4\]"),
    (call("sum", "", "%r1", "1"), SUM, r"variables of \[\] bytes, the function of \[4\]"),
    (CALL.replace("param1", "param0", 1), SUM, "declared twice"),
    (CALL.replace(".b32 param1;", ".b64 param1;"), SUM, r"\[4, 8\] bytes, the function of \[4, 4\]"),
    (CALL.replace("param1\n)", "%r1\n)"), SUM, r"in \.param variables alone"),
    (CALL.replace("call.uni", "call.all"), SUM, "opcode call.all is not known"),
    (CALL, SUM.replace("END:\nret;", "END:\n@%p1 ret;"), "goes on behind its last instruction"),
    (CALL, ".func sum() { }", "sum has no instruction"),
    (CALL, SUM.replace("[sum_param_1]", "[p0]"), "name 'p0' is not known"),
    (CALL + "OUTER:\n", SUM.replace("bra END", "bra OUTER"), "no label 'OUTER'"),
    (CALL, SUM.replace("@%p2 ret", "@%p7 ret"), "the guard '%p7' is no predicate"),
    (CALL, SUM.replace(".param .b32 sum_param_1", ".reg .b32 %q"), "expected '.param', found '.reg'"),
    (CALL, SUM.replace("%r<5>", "%r<2>"), "register '%r2' is not known"),
    (CALL, SUM.replace("bra END", "bra NOWHERE"), "no label 'NOWHERE'"),
    (CALL, SUM.replace("mov.u32 %r3", ".local .b8 depot[8];\nmov.u32 %r3"), "directive '.local'"),
    ("st.param.b32 [p0], %r1;", "", "st.param.b32 is not known"),
], ids=str)  # fmt: skip
def test_what_is_refused(body, functions, said):
    with pytest.raises(Unsupported, match=rf"(?s)PTX line \d+.*{said}|{said}"):
        results(body + WRITE, functions)
