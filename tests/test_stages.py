"""Drawing in stages: their sizes and levels, both limits, when they happen by themselves."""

import numpy as np
import pytest
import torch
from conftest import metadata_of
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
import train
from checkpoint import open_weights
from drawing.stages import Stage, resized, sizes_of, stages_of
from family import fingerprint
from flow import sd3_sigmas
from vae import VAE, to_image, to_pixels


@pytest.fixture
def draw(folders, tmp_path, capsys):
    """draw(flags): the picture of sample.py as an array, what it records, the line before drawing, stderr."""
    def run(*flags: object, record: dict | None = None, model: str = "tiny-sd3") -> tuple[np.ndarray, dict, str, str]:
        file = folders / model / ("sd3.safetensors" if model == "tiny-sd3" else "flux.safetensors")
        if record is not None:
            kept = {k: v for k, v in metadata_of(file).items() if k != "res"}
            save_file(load_file(file), tmp_path / file.name, kept | record)
            file = tmp_path / file.name
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
        files = "--weights", folders / model, "--transformer", file, "--out", out
        sample.main([*map(str, ("--prompt", "snow", *files, "--steps", 3, "--device", "cpu", *flags))])
        text = capsys.readouterr()
        with Image.open(out) as picture:
            return np.array(picture), picture.text, text.out.splitlines()[0], text.err
    return run


@pytest.mark.parametrize("size, first, expected", [
    ((4096, 4096), 1024, [(1024, 1024), (2048, 2048), (4096, 4096)]), ((1024, 1024), 1024, [(1024, 1024)]),
    ((1536, 1536), 1024, [(1024, 1024), (1536, 1536)]), ((512, 512), 1024, [(512, 512)]),
    ((512, 512), None, [(512, 512)]),
    ((4096, 1024), 1024, [(2048, 512), (4096, 1024)]), ((3072, 4096), 1024, [(896, 1184), (1664, 2208), (3072, 4096)])])
def test_stages_begin_at_the_first_size_and_at_most_double(size, first, expected):
    assert sizes_of(size, first, 32) == expected


def test_later_stages_have_the_levels_below_start():
    one, two = stages_of((2048, 2048), 1024, 0.6, 32, lambda tokens: sd3_sigmas(28))
    assert torch.equal(one.sigmas, sd3_sigmas(28)) and one.width == 1024
    assert two.sigmas[0].item() == pytest.approx(0.6) and torch.equal(two.sigmas[1:], one.sigmas[one.sigmas < 0.6])


def test_every_further_redrawing_begins_at_a_power_of_start():
    stages = stages_of((4096, 4096), 1024, 0.6, 32, lambda tokens: sd3_sigmas(28))
    assert [stage.sigmas[0].item() for stage in stages] == pytest.approx([1, 0.6, 0.36])
    redrawn = stages_of((4096, 4096), 1024, 0.6, 32, lambda tokens: sd3_sigmas(28), given=True)
    assert [stage.sigmas.tolist() for stage in redrawn] == [stage.sigmas.tolist() for stage in stages[1:]]


@pytest.mark.parametrize("first", [64, 32])
def test_start_1_is_drawing_at_once_bit_for_bit(draw, first):
    at_once = draw("--res", 128, "--first", "none", "--positions", "pi", "--trained-side", first // 32)[0]
    assert np.array_equal(draw("--res", 128, "--first", first, "--start", 1, record={})[0], at_once)


def test_a_first_stage_does_not_replace_the_recorded_trained_side(draw):
    flags = "--res", 256, "--first", 64
    assert draw(*flags, record={"res": "128", "factor": "16"})[1]["trained_side"] == "4"
    assert draw(*flags, record={})[1]["trained_side"] == "2"


@pytest.mark.parametrize("flags, same", [((), False), (("--mu", "1.15"), True), (("--time-shift", "3"), True)])
def test_a_given_time_shift_is_that_of_every_stage(flags, same):
    """At 2048 px the shift by tokens is exp(1.15): given, it holds at 1024 px too."""
    job = sample.prepared(sample.parse(["--plan", "--model", "flux", "--res", "2048", "--first", "1024", *flags]))
    first, second = (stage.sigmas for stage in job.stages)
    assert bool(torch.isin(second[1:], first).all()) == same


@pytest.mark.parametrize("flags", [("--first", "64"), ("--start", "0.4")])
def test_flags_of_stages_say_so_where_there_is_one_stage(draw, flags):
    picture, *_, notes = draw("--res", 64, *flags)
    assert f"note: {' '.join(flags)} does nothing: 64 px are drawn at once" in notes
    assert np.array_equal(picture, draw("--res", 64)[0]) and "does nothing" not in draw("--res", 128, "--first", 64)[3]


def test_start_0_is_the_round_trip_of_the_enlarged_picture(draw, folders):
    small, large = draw("--res", 64, "--first", "none")[0], draw("--res", 128, "--first", 64, "--start", 0)[0]
    vae = VAE.load(folders / "tiny-sd3" / "sd3.safetensors")
    with torch.no_grad():
        before = resized(to_image(small)[None], Stage(128, 128, torch.zeros(1)))
        expected = to_pixels(vae.decode(vae.encode(before, 16), 16)[0])
    assert np.abs(large.astype(int) - expected).mean() < 1  # the small picture was rounded to 8 bits here


@pytest.mark.parametrize("model", ["tiny-sd3", "tiny-flux"])
def test_a_file_that_records_its_size_is_drawn_in_stages_beyond_it(draw, model):
    picture, records, line, _ = draw("--res", 128, record={"res": "64"}, model=model)
    assert picture.shape == (128, 128, 3) and records["first"] == "64" and records["positions"] == "pi"
    assert "in stages from 64 px (the trained size) at noise level 0.6, positions pi from 2 tokens" in line
    assert not np.array_equal(picture, draw("--res", 128, "--first", "none", record={"res": "64"}, model=model)[0])
    assert "first" not in draw(record={"res": "64"}, model=model)[1]


def test_recorded_size_is_in_tokens_and_its_factor_counts(draw):
    assert "from 32 px" in draw("--res", 64, "--factor", 8, record={"res": "64", "factor": "16"})[2]


@pytest.mark.parametrize("record", [{"res": "banana"}, {"res": "64", "factor": "0"}, {"res": "64", "factor": "12"}])
def test_a_recorded_size_that_cannot_be_names_its_file(draw, record):
    with pytest.raises(SystemExit, match=r"sd3.safetensors: its metadata records res .* correct them"):
        draw("--res", 128, "--factor", 16, record=record)


def test_recorded_positions_are_those_of_every_stage(draw):
    records = draw("--res", 128, record={"res": "64", "positions": "ntk", "trained_side": "1"})[1]
    assert records["positions"] == "ntk" and records["trained_side"] == "1"


def test_a_file_that_records_nothing_is_drawn_at_once_with_a_line(draw, monkeypatch):
    picture, records, line, errors = draw("--res", 1056, "--steps", 1, record={})
    assert "first" not in records and "stages" not in line
    assert errors.count("note: the file does not record its trained size") == 1 and "--first 1024" in errors


def test_stock_positions_may_be_asked_for_in_stages_and_at_once(draw):
    """The file records the side it was trained at, which stock positions do not need."""
    assert draw("--res", 128, "--positions", "stock")[1]["positions"] == "stock"
    at_once = draw("--res", 128, "--first", "none", "--positions", "stock")[0]
    assert np.array_equal(at_once, draw("--res", 128, "--first", "none")[0])


@pytest.mark.parametrize("flags, says", [
    (("--first", "big"), "--first big: give pixels"), (("--first", "100"), "a multiple of 32"),
    (("--first", "64", "--start", "1.5"), "--start 1.5: give 0 to 1"),
    (("--positions", "yarn"), "need the trained side"),
    (("--positions", "pi", "--trained-side", "0"), "need the trained side"),
    (("--trained-side", "4"), "--trained-side 4: give it with --positions"),
    (("--first", "64", "--positions", "ntk", "--res", "8192"), "position table ends at")])
def test_stages_that_cannot_be_are_refused(draw, flags, says):
    with pytest.raises(SystemExit, match=says):
        draw("--res", 128, *flags, record={})


def test_positions_in_training_are_recorded_and_drawn_with(settings, model, tmp_path):
    train.train(settings(steps=1, positions="pi", trained_side=1))
    file = tmp_path / "out" / "sd3.safetensors"
    assert metadata_of(file)["positions"] == "pi" and metadata_of(file)["trained_side"] == "1"
    train.train(settings(steps=1, out=tmp_path / "stock"))
    trained, stock = (open_weights(tmp_path / out / "sd3.safetensors") for out in ("out", "stock"))
    name = "model.diffusion_model.final_layer.linear.weight"
    assert not torch.equal(trained[name].read(), stock[name].read())
    with pytest.raises(SystemExit, match="another model"):
        train.main(settings.flags(steps=2))


# ---- --from

@pytest.fixture
def photo(tmp_path):
    file = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)).save(file)
    return file


def test_a_given_picture_takes_the_place_of_the_first_stage(draw, tmp_path):
    stages = draw("--res", 128, "--first", 64, "--trained-side", 2)[0]
    draw("--res", 64, "--first", "none")
    small = tmp_path / "1.png"
    redrawn, records, line, _ = draw("--res", 128, "--from", small, "--positions", "pi", "--trained-side", 2)
    assert np.abs(redrawn.astype(int) - stages).mean() < 1  # the small picture was rounded to 8 bits here
    assert records["from"] == fingerprint(small) and records["start"] == "0.6" and "first" not in records
    assert f"redrawn from {small} (64x64 px) at noise level 0.6" in line


def test_a_given_picture_is_redrawn_in_doublings_or_smaller(photo, draw):
    assert draw("--res", "512x256", "--from", photo, "--start", 0.3)[0].shape == (256, 512, 3)
    assert draw("--res", "64x32", "--from", photo, "--start", 0)[0].shape == (32, 64, 3)


def test_start_1_forgets_the_given_picture(photo, draw):
    given = draw("--res", "128x64", "--from", photo, "--start", 1)[0]
    assert np.array_equal(given, draw("--res", "128x64", "--first", "none")[0])


@pytest.mark.parametrize("flags", [("--res", 128, "--first", 64), ("--res", "128x64", "--from", "photo.png")])
def test_an_encoder_that_overflows_or_lacks_memory_is_tried_wider_or_ends_its_picture(photo, draw, monkeypatch, flags):
    encode = VAE.encode
    monkeypatch.chdir(photo.parent)
    monkeypatch.setattr(VAE, "encode", lambda vae, x, *rest: encode(vae, x, *rest) / (x.dtype == torch.float32))
    assert "note: the VAE overflowed in bf16; fp32 was taken" in draw(*flags, "--vae-dtype", "bf16")[3]
    monkeypatch.setattr(VAE, "encode", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(SystemExit, match=r"^error: .*\d.png: the VAE ran out of memory, give a smaller --res$"):
        draw(*flags)


@pytest.mark.parametrize("flags, says", [
    (("--res", 128), "128x64 px have not the proportions of --res 128; give --res 192x96"),
    (("--res", "128x64", "--first", 64), "--first 64: give it without --from"),
    (("--res", "128x64", "--from", "nowhere.png"), "nowhere.png")])
def test_a_given_picture_that_does_not_fit_is_refused(photo, draw, flags, says):
    with pytest.raises(SystemExit, match=says):
        draw("--from", photo, *flags)
