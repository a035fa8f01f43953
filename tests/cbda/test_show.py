import numpy as np
import torch
from PIL import Image
from refusals import refused

from cbda.show import main
from common.data import DataConfig, StepLoader, Stream, load
from common.data.augmentation import ViewOptions
from common.runtime.seeding import permutation


def tiles(path) -> torch.Tensor:
    """Return the images of a sheet of 8 columns, (rows, 8, 3, 64, 64)."""
    with Image.open(path) as image:
        sheet = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    rows = [
        torch.stack([sheet[:, top + 7 : top + 71, left + 7 : left + 71] for left in range(0, 8 * 74, 74)])
        for top in range(0, sheet.shape[1] - 4, 88)
    ]
    return torch.stack(rows)


def test_a_sheet_shows_what_training_sees(tmp_path):
    epoch = 2
    flags = ["--name", "digits_m", "--size", "32", "--out", str(tmp_path), "--seed", "3", "--epoch", str(epoch)]
    flags += ["--invert", "--scale", "[0.9, 1.4]"]
    main(flags)
    found = tiles(tmp_path / "views-digits_m.png")[:, :, :, ::2, ::2]  # each pixel twice
    train = load(DataConfig(name="digits_m")).train
    index = permutation(400, 3, "shown")[:8]
    assert torch.equal(found[0], train.images[index])
    assert len(found) == 7
    views = ViewOptions(invert=True, scale=(0.9, 1.4))
    feed = StepLoader({"train": Stream(train, 400, (views.view("weak", 32), views.view("strong", 32)))})
    for later in range(3):
        (step,) = feed.epoch(epoch + later, 0, 3)
        batch = step[0]["train"]
        at = torch.stack([(batch.index == i).nonzero()[0, 0] for i in index])
        for row, view in ((1 + later, 0), (4 + later, 1)):
            assert torch.equal(found[row], batch.views[view][at])


def test_bad_input(tmp_path, capsys):
    flags = ["--out", str(tmp_path)]
    assert "epoch: expected 0 or more, got -1" in refused(capsys, main, *flags, "--epoch", "-1")
    assert refused(capsys, main, *flags, "--size", "33").startswith("error: size: expected a multiple of 4")
    assert refused(capsys, main, *flags, "--scale", "[2, 1]").startswith("error: scale: expected two factors in order")
    main(flags)
    assert "exists; add --force" in refused(capsys, main, *flags)
    main([*flags, "--force"])
