import io
import pickle
import sys

import pytest
import torch

from common.metrics.cache import cache_path, load_tensors, read_cache, write_cache


def test_a_value_comes_back_under_its_key_only(tmp_path):
    write_cache(tmp_path, "a", {"x": torch.arange(5.0), "n": 3})
    got = read_cache(tmp_path, "a")
    assert got is not None
    assert (got["x"].tolist(), got["n"]) == ([0, 1, 2, 3, 4], 3)
    assert read_cache(tmp_path, "b") is None
    cache_path(tmp_path, "a").rename(cache_path(tmp_path, "b"))
    assert read_cache(tmp_path, "b") is None


def test_any_flipped_bit_is_noticed(tmp_path):
    write_cache(tmp_path, "a", {"x": torch.arange(50.0)})
    path = cache_path(tmp_path, "a")
    content = path.read_bytes()
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        assert read_cache(tmp_path, "a") is None


def test_a_file_that_cannot_be_read_is_as_good_as_none(tmp_path):
    cache_path(tmp_path, "a").mkdir()
    assert read_cache(tmp_path, "a") is None


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path, capsys):
    (tmp_path / "file").touch()
    for key in ("a", "b"):
        write_cache(tmp_path / "file" / "cache", key, {"n": 3})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: cache: cannot write to {tmp_path / 'file' / 'cache'} (Not a directory); ")
    assert "--cache" in line


class Code:
    def __reduce__(self):
        return sys.exit, (7,)


def test_code_is_refused_and_not_run():
    content = io.BytesIO()
    torch.save({"a": Code()}, content)
    for refused in (content.getvalue(), pickle.dumps(Code())):
        with pytest.raises(ValueError, match=r".+"):
            load_tensors(refused)


def test_content_that_is_no_saved_tensor_raises_only_value_errors():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        junk = bytes(torch.randint(0, 256, (40,), generator=generator, dtype=torch.uint8).tolist())
        with pytest.raises(ValueError, match=r".+"):
            load_tensors(b"\x80\x02" + junk)
