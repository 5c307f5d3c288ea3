import csv

import numpy as np
import pytest
import rasterio
import spyndex

from support import aptile


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_the_chip_is_oriented_as_declared_and_gets_no_georeference(chip_archive):
    with rasterio.open(chip_archive / "sentinel2_chip.tif") as raster:
        assert raster.crs is None
        assert raster.descriptions == ("B02", "B03", "B04", "B08")
        pixels = raster.read()
    chip = spyndex.datasets.open("sentinel")
    for y, x in ((0, 0), (7, 250), (299, 3)):
        np.testing.assert_array_equal(pixels[:, y, x], chip.isel(x=x, y=y).values)


def test_the_demo_does_the_whole_job_and_a_second_run_finds_it_done(demo, capsys):
    folder, said = demo
    assert "tokens per tile" in said
    assert f"Open {folder / 'sentinel2_chip_r0c0.png'} first" in " ".join(said.split())
    assert len(list(folder.glob("*.png"))) == 9
    with (folder / "run" / "loss.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 60
    assert np.mean(losses[-6:]) < np.mean(losses[:6]) - 0.1
    assert aptile("demo", folder) == 0
    assert capsys.readouterr().err.count("complete already, nothing to do") == 2
