"""The stretched table against the table it comes from, and the file that carries it."""

import sys

import pytest
import torch

from checkpoint import open_weights
from mmdit import MMDiT, sincos_table
from models import stretch_positions
from models.stretch_positions import stretched, write_stretched

TABLE = "model.diffusion_model.pos_embed"


def test_table_stretched_by_one_stays():
    table = sincos_table(64, 32, base=16)[None]
    assert torch.allclose(stretched(table, 1), table, atol=1e-5)


def test_stretched_table_has_its_places_closer_together_around_the_centre():
    table, closer = sincos_table(64, 32)[None], sincos_table(64, 32, base=16, offset=31 / 4)  # half as far apart
    new = stretched(table, 2)
    assert new.shape == table.shape and new.dtype == table.dtype
    inner = closer.view(32, 32, 64)[2:-2, 2:-2] - new.view(32, 32, 64)[2:-2, 2:-2]
    assert inner.abs().max() < 0.06  # cubic interpolation of waves as short as 2π places


def test_centre_of_an_odd_table_stays():
    table = torch.randn(1, 25, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(stretched(table, 4)[0, 12], table[0, 12], atol=1e-6)


def test_file_differs_in_the_table_alone_and_loads(folders, tmp_path, monkeypatch):
    source, out = folders / "tiny-sd3" / "sd3.safetensors", tmp_path / "stretched.safetensors"
    monkeypatch.setattr(sys, "argv", ["stretch_positions.py", str(source), "--by=2", f"--out={out}"])
    stretch_positions.main()
    before, after = open_weights(source), open_weights(out)
    assert after.keys() == before.keys() and after.metadata == before.metadata
    differ = [name for name in before if not torch.equal(before[name].read(), after[name].read())]
    assert differ == [TABLE] and after[TABLE].read().dtype == before[TABLE].read().dtype
    table = stretched(before[TABLE].read(), 2)
    assert torch.equal(MMDiT.load(out).pos_embed, table.float())


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_scale_that_is_no_positive_number_is_refused(folders, tmp_path, scale):
    with pytest.raises(ValueError, match="--by"):
        write_stretched(str(folders / "tiny-sd3" / "sd3.safetensors"), scale, str(tmp_path / "x.safetensors"))


def test_flux_is_refused_by_name(folders, tmp_path):
    with pytest.raises(ValueError, match="Flux transformer, which computes its positions"):
        write_stretched(str(folders / "tiny-flux" / "flux.safetensors"), 2.0, str(tmp_path / "x.safetensors"))
    assert not any(tmp_path.iterdir())
