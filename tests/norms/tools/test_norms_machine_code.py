"""Instructions, loops and widths, from text as cuobjdump prints it; no compiler runs here but for the last test."""

import pytest
import torch

from common.norms.tools import counts, machine_code
from common.norms.tools.machine_code import Code, Instruction
from common.norms.tools.recording import Launch

TEXT = """
 Function a_kernel:
  REG:40 STACK:8 SHARED:512 LOCAL:16 TEXTURE:0 SURFACE:0 SAMPLER:0
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                          /* 0x00000a00ff017b82 */
                                                                                   /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.EL R5, desc[UR26][R2.64] ;                /* 0x0000001a02051981 */
        /*0020*/                   MOV R9, RZ ;                                    /* 0x0 */
        /*0030*/              @!P1 LDG.E.128 R12, desc[UR26][R6.64] ;              /* 0x0 */
        /*0040*/                   FADD R3, R3, R4 ;                               /* 0x0 */
        /*0050*/               @P2 BRA 0x40 ;                                      /* 0x0 */
        /*0060*/                   MUFU.EX2 R5, R5 ;                               /* 0x0 */
        /*0070*/              @UP0 UIADD3 UR4, UR4, 0x1, URZ ;                     /* 0x0 */
        /*0080*/                   STG.E.128 desc[UR26][R6.64], R12 ;              /* 0x0 */
        /*0090*/               @P3 BRA 0x30 ;                                      /* 0x0 */
        /*00a0*/                   EXIT ;                                          /* 0x0 */
        /*00b0*/                   BRA 0xb0;                                       /* 0x0 */
"""


def launch(*, threads=32, tile=128, dtype=torch.float32, writes=True, count=1) -> Launch:
    names = ["x_ptr", "g_ptr"][:count] + ["y_ptr"] * writes
    arguments = {name: torch.empty(1000, dtype=dtype, device="meta") for name in names}
    touched = {name: (0.0, 1.0) if name == "y_ptr" else (1.0, 0.0) for name in names}
    arguments |= {"table_ptr": torch.empty(3, device="meta"), "BLOCK_L": tile, "K": 3}
    touched["table_ptr"] = (1.0, 0.0)
    return Launch("a_kernel", 0, 0, None, arguments, touched, {"num_warps": threads // 32})


def test_instructions_have_addresses_names_modifiers_and_widths():
    code = machine_code.instructions(TEXT)
    want = ["LDC", "LDG", "MOV", "LDG", "FADD", "BRA", "MUFU", "UIADD3", "STG", "BRA", "EXIT", "BRA"]
    assert [each.name for each in code] == want  # whatever their predicates
    assert [each.address for each in code] == [16 * i for i in range(12)]
    assert code[1] == Instruction(0x10, "LDG", frozenset({"E", "EL"}), " R5, desc[UR26][R2.64] ")


@pytest.mark.parametrize(
    ("modifiers", "width"), [("E", 4), ("E.64", 8), ("E.128", 16), ("E.U16", 2), ("E.U8.CONSTANT", 1), ("E.S16", 2)]
)
def test_widths_are_those_of_a_name(modifiers, width):
    assert Instruction(0, "LDG", frozenset(modifiers.split(".")), "").width == width


def test_the_loop_is_the_innermost_one_that_touches_memory():
    (loop,) = machine_code.loops(machine_code.instructions(TEXT))
    assert [each.address for each in loop] == list(range(0x30, 0xA0, 0x10))
    straight = machine_code.instructions(TEXT.replace("BRA 0x30", "BRA 0xa0"))
    assert list(machine_code.loops(straight)) == [straight]  # what branches to itself ends a kernel


def test_two_loops_in_turn_both_count():
    text = "".join(
        f"/*{16 * i:04x}*/ {name} ;\n"
        for i, name in enumerate(["LDG.E R1, [R2]", "BRA 0x0", "FADD R1, R1, R1", "STG.E [R2], R1", "BRA 0x20", "EXIT"])
    )
    assert [len(loop) for loop in machine_code.loops(machine_code.instructions(text))] == [2, 3]


def test_resources_are_those_that_cuobjdump_says():
    found = machine_code.resources(TEXT)
    assert (*found,) == (40, 8, 512, 16)
    assert found.spills
    assert not found._replace(stack=0, local=0).spills
    assert found._replace(stack=0).spills
    with pytest.raises(RuntimeError, match="cuobjdump: expected REG, STACK, SHARED and LOCAL, got 'none'"):
        machine_code.resources("none")


def test_instructions_are_divided_by_the_elements_of_an_iteration():
    """Seven instructions of 32 threads for a tile of 128 elements, of which each thread loads and stores four."""
    code = Code(launch(), TEXT, 1000)
    assert code.per_element() == 7 * 32 / 128
    assert code.per_element("MUFU") == 32 / 128
    assert code.per_element("LDG", "STG") == 2 * 32 / 128
    assert code.wide == 1


def test_what_the_compiler_unrolls_is_seen_by_what_is_stored_or_loaded():
    assert Code(launch(tile=64), TEXT, 1000).per_element() == 7 * 32 / 128  # twice two elements
    assert Code(launch(tile=64, writes=False), TEXT, 1000).per_element() == 7 * 32 / 128
    assert Code(launch(tile=64, dtype=torch.bfloat16), TEXT, 1000).per_element() == 7 * 32 / 256
    # Two activations, each of which gives half of what is loaded.
    assert Code(launch(tile=64, writes=False, count=2), TEXT, 1000).per_element() == 7 * 32 / 64


def test_threads_that_hold_the_same_element_all_count():
    narrow = TEXT.replace(".128", "")
    assert Code(launch(threads=128, tile=32), narrow, 1000).per_element() == 7 * 128 / 32


def test_narrow_loads_are_seen():
    assert Code(launch(), TEXT.replace("LDG.E.128", "LDG.E.64"), 1000).wide == 0
    assert Code(launch(count=2), TEXT, 1000).wide == 0.5  # one of two


SUBJECTS = {subject.name: subject for subject in counts.SUBJECTS if subject.name != "BatchNorm2d"}
FITTED = "MixtureNorm"
"""It fits a mixture to a small batch as it is, and to locations drawn from a large one."""


def codes_by_batch(subject, shape, dtype, layout) -> dict[str, set[frozenset[str]]]:
    """What is compiled of each kernel for a step of one batch or another."""
    pytest.importorskip("triton")
    found: dict[str, set[frozenset[str]]] = {}
    for samples in (1000, 64, 63, 16, 2, 1):
        if samples == shape[1] == 1:  # a layer in training refuses a single value
            continue
        keys: dict[str, set[str]] = {}
        step = counts.record(subject, (samples, *shape), dtype, layout)
        for each in (*step.forward.kernels, *step.backward.kernels):
            keys.setdefault(each.name, set()).add(machine_code.specialise(each, 90).key)
        for kernel, which in keys.items():
            found.setdefault(kernel, set()).add(frozenset(which))
    return found


@pytest.mark.parametrize("shape", [(256, 8, 8), (64, 112, 112), (255, 7, 7), (512, 1, 1)], ids=str)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("name", [name for name in SUBJECTS if name != FITTED])
def test_a_kernel_is_compiled_once_for_all_batch_sizes(name, layout, shape):
    """A single sample has strides of its own; a layer may launch one kernel in several ways, but all in each step."""
    for dtype in (torch.float32, torch.bfloat16):
        codes = codes_by_batch(SUBJECTS[name], shape, dtype, layout)
        assert {kernel for kernel, each in codes.items() if len(each) > 1} == set()


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_the_moments_that_mixtures_are_fitted_to_are_compiled_twice(layout):
    codes = codes_by_batch(SUBJECTS[FITTED], (256, 8, 8), torch.float32, layout)
    assert {kernel: len(each) for kernel, each in codes.items() if len(each) > 1} == {"mixture_moments_kernel": 2}


def test_launches_are_specialised_as_triton_does():
    """A size that is a multiple of 16 is told apart from others, and 1 is a constant; an address counts from memory."""
    pytest.importorskip("triton")
    subject = next(s for s in counts.SUBJECTS if s.name == "SCBNorm")

    def keys(shape, layout="NCHW", dtype=torch.float32):
        kernels = counts.record(subject, shape, dtype, layout).forward.kernels
        return [machine_code.specialise(each, 90).key for each in kernels]

    assert keys((64, 32, 8, 8)) == keys((32, 32, 8, 8))
    different = [keys(shape) for shape in ((64, 32, 8, 8), (64, 32, 7, 7), (64, 1, 8, 8), (64, 32, 1, 1))]
    different += [keys((64, 32, 8, 8), "NHWC"), keys((64, 32, 8, 8), dtype=torch.bfloat16)]
    assert len({str(key) for key in different}) == len(different)
    x = torch.empty(9)
    assert machine_code.Pointer(x[1:]).data_ptr() == 4
    assert machine_code.Pointer(x).dtype == torch.float32
