"""The cases that are compiled ahead of time, and the table that is printed of them; no compiler runs here."""

import dataclasses

import pytest

from common.errors import UsageError
from common.norms.kernels import launch
from common.norms.tools import aot


def test_a_case_says_what_it_is():
    case = aot.Case(kernel="scb_rows_kernel", num_warps=4, constants={"JOINT": True, "BLOCK_C": 64})
    assert str(case) == "scb_rows_kernel fp32 positions adjacent, 4 warps, JOINT=1 BLOCK_C=64"
    with pytest.raises(TypeError, match="positional"):
        aot.Case("scb_rows_kernel", 4)  # pyright: ignore[reportCallIssue]
    with pytest.raises(dataclasses.FrozenInstanceError):
        case.num_warps = 8  # pyright: ignore[reportAttributeAccessIssue]


def test_cases_hold_every_kernel_in_every_layout_and_type_that_it_is_launched_in():
    cases = aot.cases()
    kernels = {case.kernel for case in cases}
    walks = {"scb_fwd_kernel", "scb_bwd_kernel", *launch.MIXTURE}
    sums = {
        "scb_rows_kernel",
        *(f"mixture_{name}_kernel" for name in ("merge", "coefficients", "gradients", "averages", "logits")),
    }
    assert kernels == walks | sums
    for case in cases:
        assert case.adjacent in {"positions", "channels"}
        assert case.dtype in {"fp32", "bf16", "fp16"}
        assert all(value is None or value >= 0 for value in case.constants.values())
    for kernel in walks:
        mine = [case for case in cases if case.kernel == kernel]
        assert {(case.adjacent, case.dtype) for case in mine} >= {
            (adjacent, dtype) for adjacent in ("positions", "channels") for dtype in ("fp32", "bf16")
        }
        assert any(case.hardest for case in mine)
        assert {case.dtype for case in mine if case.hardest} == {"fp32"}
    for kernel, table in launch.MIXTURE.items():
        mine = [case for case in cases if case.kernel == kernel]
        assert {case.constants["K"] for case in mine} == set(table)
        for case in mine:
            entry = table[case.constants["K"]]
            assert case.num_warps == entry.num_warps
            widest = launch.MAX_GROUP_CHANNELS[case.constants["K"]]
            assert case.constants["BLOCK_L"] * case.constants["BLOCK_C"] in (
                entry.elements,
                max(entry.elements, widest),
            )
    for kernel in sums:
        for case in (case for case in cases if case.kernel == kernel):
            assert (case.num_warps, case.adjacent, case.dtype) == (launch.SUMS.num_warps, "positions", "fp32")


@pytest.fixture
def compiled(monkeypatch):
    """Compile nothing: a case takes 32 registers, and what a test says of local memory and the stack."""
    done, taken = [], {}

    def compile_case(case, arch):
        done.append((case.kernel, arch))
        return case.kernel.encode()

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(aot, "compile_case", compile_case)
    monkeypatch.setattr(aot, "resources", lambda cubin: taken.get(cubin.decode(), (32, 0, 128, 0)))
    case = aot.Case(kernel="a_kernel", num_warps=4, constants={"K": 1})
    cases = [case, dataclasses.replace(case, kernel="b_kernel"), dataclasses.replace(case, hardest=False)]
    monkeypatch.setattr(aot, "cases", lambda: cases)
    return done, taken


def lines(capsys, *argv: str) -> tuple[int, list[str]]:
    with pytest.raises(SystemExit) as left:
        aot.main([*argv])
    return int(left.value.code or 0), capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        ([], [("a_kernel", 80), ("b_kernel", 80), ("a_kernel", 80)]),
        (["--quick"], [("a_kernel", 80), ("b_kernel", 80)]),
        (["--kernel", "b_"], [("b_kernel", 80)]),
        (["--kernel", "a_", "--quick", "--archs", "80", "90"], [("a_kernel", 80), ("a_kernel", 90)]),
    ],
)
def test_it_compiles_what_is_asked_for(compiled, capsys, flags, want):
    code, told = lines(capsys, "--archs", "80", *flags)
    assert code == 0
    assert compiled[0] == want
    assert told[:2] == ["| arch | registers | stack | shared | local | kernel |", "|---|---|---|---|---|---|"]
    assert told[2:-2] == [
        f"| sm_{arch} | 32 | 0 | 128 | 0 | {kernel} fp32 positions adjacent, 4 warps, K=1 |" for kernel, arch in want
    ]
    assert told[-2:] == ["", f"{len(want)} compiled, 0 spill"]


@pytest.mark.parametrize("taken", [(255, 8, 0, 0), (255, 0, 0, 4)])
def test_a_kernel_that_needs_stack_or_local_memory_spills(compiled, capsys, taken):
    compiled[1]["b_kernel"] = taken
    code, told = lines(capsys, "--archs", "80", "90")
    assert code == 1
    assert told[-1] == "6 compiled, 2 spill"
    assert "| sm_90 | " + " | ".join(map(str, taken)) + " | b_kernel fp32 positions adjacent, 4 warps, K=1 |" in told


def test_interpreted_kernels_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UsageError, match=r"^TRITON_INTERPRET: expected it unset, .* got 1$"):
        aot.main([])


@pytest.mark.parametrize(("said", "found"), [(" REG:40 STACK:8 SHARED:512 LOCAL:16 TEXTURE:0", (40, 8, 512, 16))])
def test_resources_are_those_that_cuobjdump_says(monkeypatch, said, found):
    pytest.importorskip("triton")
    monkeypatch.setattr(aot.subprocess, "run", lambda *_, **__: aot.subprocess.CompletedProcess([], 0, stdout=said))
    assert aot.resources(b"cubin") == found
    monkeypatch.setattr(aot.subprocess, "run", lambda *_, **__: aot.subprocess.CompletedProcess([], 0, stdout="none"))
    with pytest.raises(RuntimeError, match="expected REG, STACK, SHARED and LOCAL, got 'none'"):
        aot.resources(b"cubin")
