"""The detector of races, on loops whose answer is known."""

import pytest

from .races import races

# a pipelined loop as Triton writes it: turn i multiplies tile i, copies tile i + ahead into its slot
PIPELINE = """
tt.func public @kernel(%last: i32) attributes {{noinline = false}} {{
  %zero = arith.constant 0 : i32 loc(#loc1)
  %one = arith.constant 1 : i32
  %start = arith.constant -1 : i32
  %first = arith.constant {first} : i32
  %slots = arith.constant {slots} : i32
  %x = ttg.local_alloc : () -> !ttg.memdesc<{slots}x64x16xbf16, #shared, #smem, mutable>
  %none = arith.constant dense<0.0> : tensor<64x64xf32, #mma>
  %loop:3 = scf.for %i = %zero to %last step %one iter_args(%acc = %none, %in = %first, %out = %start) -> (tensor<64x64xf32, #mma>, i32, i32) : i32 {{
    %next_out = arith.addi %out, %one : i32
    %wraps_out = arith.cmpi sge, %next_out, %slots : i32
    %slot_out = arith.select %wraps_out, %zero, %next_out : i32
    %read = ttg.memdesc_index %x[%slot_out] : !ttg.memdesc<{slots}x64x16xbf16> -> !ttg.memdesc<64x16xbf16>
    %come = ttg.async_wait {{num = {waited} : i32}}
    %turned = ttg.memdesc_trans %read {{order = array<i32: 1, 0>}} : !ttg.memdesc<64x16xbf16> -> !ttg.memdesc<16x64xbf16>
    %product = ttng.warp_group_dot %read, %turned, %acc {{isAsync = true}} : !ttg.memdesc<64x16xbf16> * !ttg.memdesc<16x64xbf16> -> tensor<64x64xf32, #mma>
    %done = ttng.warp_group_dot_wait %product {{pendings = {pendings} : i32}} : tensor<64x64xf32, #mma>
    %total = "tt.reduce"(%i) <{{axis = 0 : i32}}> ({{
    ^bb0(%a: f32, %b: f32):
      tt.reduce.return %a : f32
    }}) : (i32) -> i32
    %next_in = arith.addi %in, %one : i32
    %wraps_in = arith.cmpi sge, %next_in, %slots : i32
    %slot_in = arith.select %wraps_in, %zero, %next_in : i32
    %write = ttg.memdesc_index %x[%slot_in] : !ttg.memdesc<{slots}x64x16xbf16> -> !ttg.memdesc<64x16xbf16>
    %copy = ttg.async_copy_global_to_local %place, %write : tensor<64x16x!tt.ptr<bf16>> -> <64x16xbf16>
    %group = ttg.async_commit_group tokens %copy
    scf.yield %done, %slot_in, %slot_out : tensor<64x64xf32, #mma>, i32, i32
  }} loc(#loc2)
  %rest = ttng.warp_group_dot_wait %loop#0 {{pendings = 0 : i32}} : tensor<64x64xf32, #mma>
  ttg.local_dealloc %x : !ttg.memdesc<{slots}x64x16xbf16>
}}
"""
OVERWRITES = "%copy overwrites %x while a product reads it"
EARLY = "%product reads %x before its copy has come"


@pytest.mark.parametrize(
    "slots, ahead, pendings, waited, found",
    [
        (1, 1, 0, 0, []),
        (1, 1, 1, 0, [OVERWRITES]),  # the one buffer is refilled while its product runs
        (1, 1, 3, 0, [OVERWRITES]),
        (2, 1, 1, 0, []),
        (2, 1, 2, 0, [OVERWRITES]),  # of the turn before
        (2, 2, 0, 1, []),
        (2, 2, 1, 1, [OVERWRITES]),
        (3, 2, 0, 1, []),
        (3, 1, 1, 0, []),
        (2, 1, 0, 1, [EARLY]),
    ],
)
def test_races_of_a_pipeline(slots, ahead, pendings, waited, found):
    text = PIPELINE.format(slots=slots, first=ahead - 1, pendings=pendings, waited=waited)
    assert races(text) == found
