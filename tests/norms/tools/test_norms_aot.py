"""The launches that are compiled ahead of time and the table that is printed of them; no compiler runs here."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import UsageError
from common.norms.tools import aot, counts
from common.norms.tools.recording import Launch

pytest.importorskip("triton")


def launched(name: str, size: int = 0) -> Launch:
    x = torch.empty(size, device="meta")
    function = SimpleNamespace(__name__=name)
    return Launch(name, 0, 0, function, {"x_ptr": x, "BLOCK_L": 256}, {"x_ptr": (1.0, 0.0)}, {"num_warps": 4}, (1,))


def case(name: str = "mixture_apply_kernel", **other: Any) -> aot.Case:
    values: dict[str, Any] = {"subject": "UCBNorm", "shape": aot.MEASURED, "layout": "NCHW", "dtype": "float32"}
    values |= {"num": 3, **other}
    return aot.Case(launched(name, torch.Size(values["shape"]).numel()), **values)


def test_a_case_says_what_it_is():
    assert str(case()) == "UCBNorm, K=3, 64x64x112x112 NCHW float32"
    assert case(shape=(2, 3, 4, 5)).size == 120


@pytest.mark.parametrize(
    ("other", "budget"),
    [
        ({}, 42),
        ({"layout": "NHWC"}, 48),
        ({"name": "mixture_moments_kernel"}, 50),
        ({"name": "mixture_moments_kernel", "layout": "NHWC"}, 55),
        ({"name": "mixture_sums_kernel"}, 45),
        ({"name": "mixture_sums_kernel", "layout": "NHWC"}, 52),
        ({"name": "mixture_bwd_kernel"}, 72),
        ({"name": "mixture_bwd_kernel", "layout": "NHWC"}, 80),
        ({"subject": "SCBNorm", "name": "scb_fwd_kernel"}, 5),
        ({"subject": "SCBNorm", "name": "scb_fwd_kernel", "layout": "NHWC"}, 8),
        ({"subject": "SCBNorm", "name": "scb_bwd_kernel"}, 12),
        ({"subject": "SCBNorm", "name": "scb_bwd_kernel", "layout": "NHWC"}, 14),
        ({"subject": "UCBNorm, groups=1"}, 42 * 1.3),
        ({"subject": "UCBNorm, evaluation"}, None),
        ({"num": 8}, None),
        ({"dtype": "bfloat16"}, 42),
        ({"shape": (64, 256, 8, 8)}, None),
        ({"name": "another_kernel"}, 0),  # a kernel without a budget has to be given one
    ],
)
def test_budgets_are_those_that_were_set(other, budget):
    assert case(**other).budget == budget


@pytest.mark.parametrize(
    ("shape", "layout", "wide"),
    [
        ((64, 64, 112, 112), "NCHW", True),
        ((64, 255, 4, 4), "NCHW", True),
        ((64, 64, 7, 7), "NCHW", False),
        ((64, 64, 7, 7), "NHWC", True),
        ((64, 255, 4, 4), "NHWC", False),
    ],
)
def test_loads_may_be_wide_where_neighbours_come_in_runs_of_sixteen(shape, layout, wide):
    assert case(shape=shape, layout=layout).may_be_wide == wide


def test_quick_cases_are_every_kernel_of_the_default_layer_once():
    found = aot.cases(quick=True)
    where = {(each.subject, each.shape, each.num) for each in found}
    assert where == {
        ("UCBNorm", aot.MEASURED, 3),
        ("UCBNorm, groups=1", aot.MEASURED, 3),
        ("SCBNorm", aot.MEASURED, 3),
        ("UCBNorm, update=weight", (64, 255, 7, 7), 2),
    }
    step = counts.record(next(s for s in counts.SUBJECTS if s.name == "UCBNorm"), aot.MEASURED, torch.float32)
    first = [each.launch.name for each in found if each.subject == "UCBNorm"]
    assert sorted(first) == sorted({each.name for each in (*step.forward.kernels, *step.backward.kernels)})


def test_cases_hold_layers_layouts_and_types_and_pass_over_what_the_kernels_do_not_take(monkeypatch):
    subjects = [s for s in counts.SUBJECTS if s.name in ("BatchNorm2d", "UCBNorm", "UCBNorm, groups=1", "MixtureNorm")]
    weight = next(s for s in counts.SUBJECTS if s.name == "UCBNorm, update=weight")
    monkeypatch.setattr(counts, "SUBJECTS", [*subjects, weight])
    monkeypatch.setattr(aot, "SHAPES", ((2, 600, 4, 4),))  # up to 512 channels share one of 3 posteriors
    found = aot.cases()
    assert {each.subject for each in found if each.num == 3} == {"UCBNorm", "UCBNorm, update=weight"}
    assert {each.num for each in found} == set(aot.COMPONENTS)
    assert {(each.layout, each.dtype) for each in found} == {
        (layout, dtype) for layout in ("NCHW", "NHWC") for dtype in ("float32", "bfloat16")
    }


USAGE = "Function k: REG:40 STACK:{stack} SHARED:512 LOCAL:{local} TEXTURE:0"
LOOP = """
        /*0000*/                   MOV R1, R2 ;  /* 0x0 */
        /*0010*/                   LDG.E{wide} R4, desc[UR4][R2.64] ;  /* 0x0 */
{body}        /*f000*/              @P0 BRA 0x10 ;  /* 0x0 */
        /*f010*/                   EXIT ;  /* 0x0 */
"""


@pytest.fixture
def compiled(monkeypatch):
    """Compile nothing: what the compiler would make of a kernel is what a test says."""
    done, made = [], {}

    def compile_launch(launch, arch):
        done.append((launch.name, arch))
        return launch.name

    def disassembled(name):
        stack, local, wide, count = made.get(name, (0, 0, ".128", 5))
        body = "".join(f"        /*{32 + 16 * i:04x}*/ FADD R{i}, R1, R2 ;\n" for i in range(count))
        return USAGE.format(stack=stack, local=local) + LOOP.format(wide=wide, body=body)

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(aot, "compile_launch", compile_launch)
    monkeypatch.setattr(aot, "disassembled", disassembled)
    cases = [case(), case("mixture_sums_kernel"), case("mixture_bwd_kernel", num=8)]
    monkeypatch.setattr(aot, "cases", lambda quick=False: cases[: 2 if quick else 3])
    return done, made


def lines(capsys, *argv: str) -> tuple[int, list[str]]:
    with pytest.raises(SystemExit) as left:
        aot.main([*argv])
    return int(left.value.code or 0), capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        ([], [("mixture_apply_kernel", 80), ("mixture_sums_kernel", 80), ("mixture_bwd_kernel", 80)]),
        (["--quick"], [("mixture_apply_kernel", 80), ("mixture_sums_kernel", 80)]),
        (["--kernel", "sums"], [("mixture_sums_kernel", 80)]),
        (["--kernel", "sums", "--archs", "80", "90"], [("mixture_sums_kernel", 80), ("mixture_sums_kernel", 90)]),
    ],
)
def test_it_compiles_what_is_asked_for(compiled, capsys, flags, want):
    code, told = lines(capsys, "--archs", "80", *flags)
    assert (code, compiled[0]) == (0, want)
    assert told[-1] == f"{len(want)} compiled, 0 spill, 0 budgets missed"


def test_a_row_says_what_a_kernel_takes(compiled, capsys):
    """Seven instructions in a loop of 128 threads, each of which loads four of the elements of two tiles of 256."""
    _, told = lines(capsys, "--archs", "90", "--kernel", "apply")
    assert told[2] == f"| sm_90 | mixture_apply_kernel | 40 | 0 | 512 | 0 | 2 | 42 | 0.0 | 100% | {case()} |"


@pytest.mark.parametrize(
    ("made", "what"),
    [
        ((8, 0, ".128", 5), "8 bytes of stack, 0 of local memory"),
        ((0, 4, ".128", 5), "0 bytes of stack, 4 of local memory"),
        ((0, 0, ".64", 5), "0% by loads of 128 bits"),
        ((0, 0, ".128", 167), "42 instructions an element, budget 42"),
        ((0, 0, ".128", 170), "43 instructions an element, budget 42"),
    ],
)
def test_what_misses_a_budget_is_named_and_fails(compiled, capsys, made, what):
    compiled[1]["mixture_apply_kernel"] = made
    code, told = lines(capsys, "--archs", "90")
    bad = [line for line in told if line.startswith("missed: ")]
    want = [] if what.startswith("42") else [f"missed: sm_90 mixture_apply_kernel, {case()}: {what}"]
    assert (code, bad) == (len(want), want)
    assert told[-1] == f"3 compiled, {'bytes' in what:d} spill, {len(want)} budgets missed"


def test_budgets_of_instructions_are_of_one_gpu(compiled, capsys):
    compiled[1]["mixture_apply_kernel"] = (0, 0, ".128", 1000)
    assert lines(capsys, "--archs", "80", "100")[0] == 0
    assert lines(capsys, "--archs", "90")[0] == 1


def test_interpreted_kernels_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UsageError, match=r"^TRITON_INTERPRET: expected it unset, .* got 1$"):
        aot.main([])


def test_a_case_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        case().num = 8  # pyright: ignore[reportAttributeAccessIssue]
