"""What docs/layers.md shows runs."""

import re
from pathlib import Path

import pytest

import common.norms

PAGE = Path(__file__).parents[2] / "docs" / "layers.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


# What the page says of it, where it converts a ViT.
@pytest.mark.filterwarnings("ignore:blocks.0.norm1 and 24 more. a LayerNorm keeps no statistics:UserWarning")
def test_every_python_block_runs_in_order(capsys):
    text = PAGE.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python") > 5
    namespace: dict[str, object] = {"__name__": "docs.layers"}
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        code = "\n" * line + block[1]  # so that a traceback names the line of the page
        exec(compile(code, str(PAGE), "exec"), namespace)
    assert namespace["names"] == ["bn1", *LAYER1, "layer4.1.bn1", "layer4.1.bn2"]
    assert capsys.readouterr().out


LAYER1 = [f"layer1.{block}.bn{norm}" for block in (0, 1) for norm in (1, 2)]


SHOWN = (
    "MixtureNorm", "SCBNorm", "UCBNorm", "calibrate", "clusters", "collect_health", "convert_norms", "converted",
    "log_scalars", "norm_act", "recalibrate", "revert_norms", "scb_state_from_base", "ucb_state_from_batch_norm",
)  # fmt: skip


def test_the_page_shows_what_a_user_calls():
    assert set(SHOWN) <= set(common.norms.__all__)
    assert [name for name in SHOWN if not re.search(rf"\b{name}\(", PAGE.read_text(encoding="utf-8"))] == []
