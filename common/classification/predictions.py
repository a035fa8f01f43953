"""What a classifier says of a folder of images: a table, and a sheet to look at."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from PIL import Image
from torch import Tensor

from common.data import check_folder, images_below, read_images
from common.reports.sheet import captioned_sheet
from common.runtime.atomic import write_atomic, write_text_atomic
from common.runtime.paths import refuse_overwriting

_SHOWN = 64


class PredictionFiles:
    """The files predictions.csv and predictions.png of a folder of images.

    Args:
        images: the folder of images.
        out: where the files go.
        force: write over those that are there.

    Raises:
        UsageError: if there is no such folder, or a file is in the way.
    """

    def __init__(self, images: Path, out: Path, *, force: bool = False) -> None:
        check_folder(images, "images")
        self.root, self.table, self.sheet = images, out / "predictions.csv", out / "predictions.png"
        refuse_overwriting(self.table, self.sheet, force=force)

    def read(self, size: int, fit: Literal["cut", "pad"] = "cut") -> Tensor:
        """Return the image files at any depth of the folder, uint8 (N, 3, size, size), in the order of paths.

        Args:
            size: side that images are brought to.
            fit: the centre of each, or all of it between bars.

        Raises:
            UsageError: if there are none, or one cannot be read.
        """
        self.files = images_below(self.root, "images")
        return read_images(self.files, size, fit)

    def write(
        self, images: Tensor, logits: Tensor, classes: Sequence[str], columns: Mapping[str, Sequence[str]]
    ) -> None:
        """Write a row for each file, its class and probability, and a sheet of the first 64; print where they are.

        Args:
            images: as `read` returned them.
            logits: of the images, floating (N, C).
            classes: names of the classes C.
            columns: further columns of the table by name, each with N texts.
        """
        best, said = logits.softmax(1).max(1)
        named = [(classes[k], p) for k, p in zip(said.tolist(), best.tolist(), strict=True)]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["file", "class", "probability", *columns])
        for file, (name, p), *more in zip(self.files, named, *columns.values(), strict=True):
            writer.writerow([file.relative_to(self.root), name, f"{p:.6f}", *more])
        write_text_atomic(self.table, text.getvalue())
        captions = [f"{name}: {p:.0%}" for name, p in named[:_SHOWN]]
        picture = Image.fromarray(captioned_sheet(images[:_SHOWN], captions).permute(1, 2, 0).numpy())
        write_atomic(self.sheet, lambda file: picture.save(file, "PNG"))
        print(f"table      {self.table}\nsheet      {self.sheet}")
