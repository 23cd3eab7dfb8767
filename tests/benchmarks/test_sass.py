"""Reading machine code: instructions, loops, widths, spills."""

from __future__ import annotations

import sass
from sass import Code, Instruction, load_widths, moved_bytes, unequal_sums

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;    /* 0x00000a00ff017b82 */
                                                             /* 0x000fe20000000800 */
        /*0010*/              @!P0 BRA 0x80 ;                /* 0x00000000001c8947 */
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/             @P1   LDG.E.U16 R9, desc[UR4][R2.64+0x10] ;
        /*0040*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0050*/             @!UP1 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0060*/               @P0 BRA 0x20 ;
        /*0070*/                   STL [R1], R8 ;
        /*0080*/                   STG.E.64 desc[UR4][R2.64], R8 ;
        /*0090*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*00a0*/               @P2 BRA 0x10 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0xc0;
        /*00d0*/                   NOP;
"""

AMDGCN = """
kernel:                                 ; @kernel
; %bb.0:
\ts_load_dwordx2 s[0:1], s[2:3], 0x0
.LBB0_1:                                ; %loop
\tbuffer_load_dwordx4 v[4:7], v1, s[4:7], 0 offen
\tv_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]
\tglobal_store_short v1, v0, s[0:1]
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
\ts_nop 0
    .sgpr_spill_count: 1
    .vgpr_count:     58
    .vgpr_spill_count: 2
"""


def parse(text: str = SASS) -> Code:
    return Code(list(sass._parse_sass(text)), 32, 0, 32)


def test_instructions_end_before_the_padding() -> None:
    code = parse()
    names = [item.name for item in code.instructions]
    assert names[:3] == ["LDC", "BRA", "LDG.E.128"]
    assert names[-1] == "EXIT"
    assert len(names) == 12
    assert code.instructions[1].target == 0x80
    assert code.instructions[1].address == 0x10


def test_loops_are_found_from_the_inside_out() -> None:
    loops = parse().loops()
    assert [len(body) for body in loops] == [5, 10]
    assert loops[0][0].address == 0x20
    assert loops[0][-1].address == 0x60


def test_the_main_loop_multiplies_and_moves() -> None:
    code = parse()
    body = code.main_loop()
    assert len(body) == 5
    assert moved_bytes(body) == 16 + 2
    assert load_widths(body) == {16: 1, 2: 1}
    assert moved_bytes(code.instructions) == 16 + 2 + 8 + 4
    assert sum(item.is_matrix for item in code.instructions) == 1


def test_without_products_the_busiest_loop_is_the_main_one() -> None:
    body = parse(SASS.replace("HMMA.16816.F32.BF16", "FFMA")).main_loop()
    assert len(body) == 10


def test_a_kernel_without_loops_is_its_own() -> None:
    straight = [Instruction(0, "LDG.E.128"), Instruction(16, "EXIT")]
    assert Code(straight, 8, 0, 32).main_loop() == straight


def test_a_group_of_copies_is_closed_by_what_loads_nothing() -> None:
    body = [Instruction(0, "LDGSTS.E.BYPASS.128"), Instruction(16, "LDGDEPBAR")]
    assert load_widths(body) == {16: 1}
    assert moved_bytes(body) == 16


def test_amd_code_reads_alike() -> None:
    code = sass._read_amdgcn(AMDGCN)
    assert (code.registers, code.spilled, code.lanes) == (58, 3, 64)
    assert len(code.instructions) == 5
    body = code.main_loop()
    assert [item.name.partition("_")[0] for item in body] == ["buffer", "v", "global", "s"]
    assert moved_bytes(body) == 18
    assert load_widths(body) == {16: 1}
    assert body[1].is_matrix


SUM = """
	mul.f32 	%r3, %r1, %r2;
	shfl.sync.bfly.b32 	%r4, %r3, 16, 31, -1;
	fma.rn.f32 	%r5, %r1, %r2, %r4;
	shfl.sync.bfly.b32 	%r6, %r5, 8, 31, -1;
	add.f32 	%r7, %r5, %r6;
"""


def test_a_sum_whose_first_product_is_fused() -> None:
    assert unequal_sums(SUM) == 1
    assert unequal_sums(SUM + SUM.replace("bfly.b32 \t%r4,", "bfly.b32 \t%r4|%p1,")) == 2
    # In another order; and what is no such sum: another factor, a sum that was rounded, another
    # product in the same register.
    assert unequal_sums(SUM.replace("%r5, %r1, %r2", "%r5, %r2, %r1")) == 1
    assert unequal_sums(SUM.replace("%r5, %r1, %r2", "%r5, %r1, %r9")) == 0
    assert (
        unequal_sums(SUM.replace("fma.rn.f32 \t%r5, %r1, %r2, %r4", "add.f32 %r5, %r3, %r4")) == 0
    )
    assert unequal_sums(SUM.replace("\tshfl", "\tadd.f32 %r3, %r1, %r2;\n\tshfl", 1)) == 0
