import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.runtime import device
from common.runtime.device import (
    DTYPES,
    autocast,
    cpu_quota,
    memory_format,
    resolve_device,
    set_determinism,
    set_threads,
)
from common.runtime.errors import UsageError


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/cpu"
V1_LINES = "12:memory:/elsewhere\n4:cpuacct,cpu:/docker/a\n1:name=systemd:/docker/a\n"
QUOTAS: dict[str, tuple[str, dict[str, str], float | None]] = {
    "no control groups at all": ("", {}, None),
    "no limit": ("0::/a\n", {f"{V2}/a/cpu.max": "max 100000\n"}, None),
    "its own": ("0::/a\n", {f"{V2}/a/cpu.max": "150000 50000\n"}, 3.0),
    "a parent's": ("0::/a/b/c\n", {f"{V2}/a/b/c/cpu.max": "max 100000\n", f"{V2}/a/cpu.max": "200000 100000\n"}, 2.0),
    "a parent's, looser": ("0::/a/b\n", {f"{V2}/a/b/cpu.max": "1000 1000\n", f"{V2}/a/cpu.max": "9000 1000\n"}, 1.0),
    "in a container": ("0::/\n", {f"{V2}/cpu.max": "50000 100000\n"}, 0.5),
    "a path of the host": ("0::/../host\n", {f"{V2}/cpu.max": "250000 100000\n"}, 2.5),
    "version 1": (V1_LINES, {f"{V1}/cpu.cfs_quota_us": "350000\n", f"{V1}/cpu.cfs_period_us": "100000\n"}, 3.5),
    "version 1, no limit": (V1_LINES, {f"{V1}/cpu.cfs_quota_us": "-1\n", f"{V1}/cpu.cfs_period_us": "1\n"}, None),
}


def test_the_quota_is_the_tightest_of_its_group_and_the_groups_above(tmp_path):
    for case, (groups, files, expected) in QUOTAS.items():
        root = write(tmp_path / case, files | ({"proc/self/cgroup": groups} if groups else {}))
        assert cpu_quota(root) == expected, case


def test_threads_are_as_many_as_asked_for_or_as_the_quota_feeds(monkeypatch):
    chosen: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    for quota, threads in ((0.5, 0), (1.99, 0), (7.5, 0), (64.0, 0), (2.0, 5), (None, 0)):
        monkeypatch.setattr(device, "cpu_quota", lambda quota=quota: quota)
        set_threads(threads)
    assert chosen == [1, 1, 7, 8, 5]  # without a quota torch's own choice stands


def test_auto_takes_cuda_where_there_is_one(monkeypatch):
    for available, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert resolve_device("auto").type == kind


def test_another_device_is_refused():
    for name in ("tpu", "cuda:", "cuda:-1", "cpu:0", "", "xcuda"):
        with pytest.raises(UsageError, match=f"^device: expected auto, cpu, cuda or cuda:n, got {re.escape(name)}$"):
            resolve_device(name)


def test_a_device_torch_does_not_see_is_refused(monkeypatch):
    for name, count in (("cuda", 1), ("cuda:1", 2), ("cpu", 0)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert str(resolve_device(name)) == name
    for name, count in (("cuda", 0), ("cuda:1", 1)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        with pytest.raises(UsageError, match=f"^device: {name} asked for, but torch sees {count} CUDA devices"):
            resolve_device(name)


def test_determinism_is_asked_for_and_leaves_a_workspace_that_the_user_chose(monkeypatch):
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        torch.backends.cudnn.benchmark = True
        set_determinism(True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        set_determinism(True)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
        torch.use_deterministic_algorithms(False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        set_determinism(False)
        assert torch.backends.cudnn.benchmark
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


@pytest.mark.parametrize(("precision", "dtype"), DTYPES.items())
def test_a_precision_is_the_type_of_a_product(precision, dtype):
    a = torch.ones(2, 2)
    with autocast(torch.device("cpu"), precision):
        assert (a @ a).dtype == dtype


def test_channels_last_is_a_layout():
    image = torch.zeros(2, 3, 4, 4)
    assert image.contiguous(memory_format=memory_format(True)).stride() == (48, 1, 12, 3)
    assert image.contiguous(memory_format=memory_format(False)).stride() == (48, 16, 4, 1)


_FAULTS = """
import resource, torch
from common.runtime.device import keep_freed_memory
print(keep_freed_memory())
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.empty(2**21).fill_(1) for _ in range(8)]  # 8 MiB each
    del kept
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="another C library than glibc")
@pytest.mark.parametrize(
    ("environment", "answer", "kept"),
    [
        ({}, "True", True),
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, "False", False),
    ],
)
def test_memory_that_is_wanted_again_is_not_given_back_and_faulted_in_anew(environment, answer, kept):
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS], env=plain | environment, capture_output=True, text=True, check=True
    )
    said, faults = done.stdout.split()
    assert said == answer
    # 64 MiB are 16,384 pages of 4 KiB, or 32 where the kernel gives 2 MiB at a time.
    assert (int(faults) < 16) == kept
