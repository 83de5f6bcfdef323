"""The settings of a run: defaults of recipe and family, which of them identify a run, refusals."""

import re
from dataclasses import asdict, fields

import pytest
import torch
from conftest import ROOT, run_script

from family import FLUX_DEV, FLUX_SCHNELL, SD3
from flow import SNR_HUBER
from training.settings import GIB, IDENTITY, SOURCE, Machine, Settings, check, parse, settle

# compared by what they lead to: --small by the sizes of all pictures, positions in the model's configuration
MAY_CHANGE = {"data", "out", "cache", "small", "positions", "trained_side", "recipe", "steps", "shard", "offload",
              "accumulate", "activations", "ema_on_host", "compile", "device", "save_dtype", "save_every", "keep",
              "log_every", "sample_every", "validate", "validate_every", "sequence", "threads", "export", "plan",
              "dry_run"}
# how the released trainers prepare pictures and captions, and the cell of docs/differences.md that says so
RELEASE = {
    "mirrored crops": ("flip", True, "with probability 1/2"),
    "captions": ("drop_caption", 0, "always the caption"),
    "resizing": ("resize", "bilinear", "bilinear"),
    "pictures smaller than the crop": ("small", "enlarge", "enlarged"),
    "what the loss compares": ("objective", "release", "bands of the denoised latent"),
    "loss weight w_t": ("weighting", "none", "1"),
    "guidance fed to Flux-dev": ("guidance", 3.5, "3.5"),
    "σ for Flux": ("density", "uniform", "uniform, no time shift"),
    "σ for SD3": ("density", "logit_normal", "logit-normal(0, 1), time shift 3"),
    "T5 tokens for Flux": ("t5_length", 77, "77 in training"),
    "T5 tokens for SD3": ("t5_length", 77, "77 in training")}


def test_every_setting_either_identifies_a_run_or_may_change():
    names = {field.name for field in fields(Settings)}
    assert names == {*IDENTITY, *SOURCE, *MAY_CHANGE}
    assert len(names) == len(IDENTITY) + len(SOURCE) + len(MAY_CHANGE)


def test_recipe_sets_what_the_flags_leave_open_and_single_flags_override_it(settings):
    release, chosen = {"recipe": "release"}, {}
    mixed = release | {"objective": "noise", "resize": "lanczos", "small": "refuse"}
    for name, changed in (("ours", {}), ("release", release), ("paper", {"recipe": "paper"}), ("mixed", mixed)):
        s = settle(settings(**changed), SD3)
        chosen[name] = (s.objective, s.dilation, s.latent_shift, s.flip, s.drop_caption, s.resize, s.small, s.t5_length)
        assert (s.density, s.time_shift) == ("logit_normal", 3.0)
    assert chosen["ours"] == ("paper", 2, True, True, 0.1, "lanczos", "refuse", None)
    assert chosen["paper"] == ("paper", 2, True, False, 0, "lanczos", "refuse", None)
    assert chosen["release"] == ("release", 1, False, True, 0, "bilinear", "enlarge", 77)
    assert chosen["mixed"] == ("noise", 1, False, True, 0, "lanczos", "refuse", 77)


@pytest.mark.parametrize("family", [SD3, FLUX_DEV, FLUX_SCHNELL])
def test_release_recipe_is_what_the_table_of_differences_says_of_the_release(settings, family):
    text = (ROOT / "docs" / "differences.md").read_text()
    table = re.search(r"## Training\n\n((?:\|.*\n)+)", text)[1]
    rows = [row.strip("| ").split(" | ") for row in table.splitlines() if " | " in row]
    cells = {row[0]: row[2] for row in rows}
    recipe = settle(settings(recipe="release"), family)
    for row, (name, value, words) in RELEASE.items():
        assert cells[row].startswith(words), row
        of_another = "SD3" in row and family is not SD3 or "Flux" in row and family is SD3
        assert of_another or getattr(recipe, name) == value or name == "guidance" and family is FLUX_SCHNELL, row
    (flags,) = re.findall(r"--recipe release` is `([^`]*)`", " ".join(text.split()))
    flags = flags if family.release_drops_latent_shift else flags.replace("--no-latent-shift", "")
    by_hand = settle(parse([*settings.flags(), *flags.split()]), family)
    assert asdict(by_hand) | {"recipe": "release"} == asdict(recipe)


@pytest.mark.parametrize("flag", ["weights", "data", "out", "transformer", "cache"])
def test_empty_flag_of_an_unset_shell_variable_is_refused(flag):
    with pytest.raises(ValueError, match=f'--{flag} "": give a value; a shell variable may be unset'):
        parse([f"--{flag}="])


@pytest.mark.parametrize("name, value, words", [
    ("LOCAL_WORLD_SIZE", "two", "LOCAL_WORLD_SIZE=two"), ("RANK", "0", "RANK=0 and WORLD_SIZE=None"),
    ("WORLD_SIZE", "-1", "WORLD_SIZE=-1")])
def test_environment_that_torchrun_did_not_set_is_refused_in_one_line(settings, name, value, words):
    done = run_script("train.py", *settings.flags(), **{name: value})
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith(f"error: {words}") and "torchrun" in line


def test_family_decides_what_the_flags_leave_open(settings):
    dev, schnell = settle(settings(recipe="release"), FLUX_DEV), settle(settings(), FLUX_SCHNELL)
    assert (dev.density, dev.time_shift, dev.guidance, dev.latent_shift) == ("uniform", 1.0, 3.5, True)
    assert schnell.guidance is None
    by_tokens = settle(settings(time_shift="tokens", res=1024), FLUX_DEV)
    assert by_tokens.time_shift == pytest.approx(1.878, abs=1e-3)  # exp(0.63)
    assert settle(settings(res=4096), SD3).activations == "recompute" and settle(settings(), SD3).activations == "keep"


def test_losses_are_settled_from_the_flags_that_name_them(settings):
    huber, beta = (settle(settings(**changed), SD3) for changed in ({"objective": "snr_huber"}, {"density": "beta"}))
    assert huber.huber_snr == SNR_HUBER and beta.beta == (2, 4) and huber.beta is beta.huber_snr is None
    given = settle(settings(objective="snr_huber", huber_snr="0.1,2,0.5,5,0", sigma_range="0.46,1"), SD3)
    assert given.huber_snr == (0.1, 2, 0.5, 5, 0) and given.sigma_range == (0.46, 1)
    assert settle(settings(guidance="1,4"), FLUX_DEV).guidance == (1, 4)
    assert (settings(guidance="1,4").guidance_shown, settings(guidance=1).guidance_shown) == (2.5, 1)


@pytest.mark.parametrize("changed, words", [
    ({"objective": "velocity", "levels": 2}, "--objective velocity has no bands"),
    ({"objective": "snr_huber", "huber": 0.1}, "--huber 0.1: the width of --objective snr_huber follows sigma"),
    ({"huber_snr": "0.2,1,0.5,5,0"}, "--huber-snr is a setting of --objective snr_huber"),
    ({"cache_latents": True, "flip": True}, "--flip --cache-latents: cached latents are of central crops"),
    ({"time_shift": "tokens", "res": 8192}, "--time-shift tokens (1.038e+05 at --res 8192): give a number up to 1,000"),
    ({"time_shift": "tokens", "res": 65536}, "--time-shift tokens ("),
    ({"beta": "2,4"}, "--beta is a setting of --density beta"),
    ({"sigma_range": "0.9999,1", "time_shift": 1}, "--sigma-range 0.9999,1: give a range with 0.1% of the sigmas"),
    ({"guidance": "1,4"}, "--guidance 1,4: this is SD3, which has no guidance input")])
def test_losses_that_contradict_are_refused_in_one_line(settings, changed, words):
    with pytest.raises(ValueError) as refusal:
        settle(settings(**changed), SD3)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("changed, words", [
    ({"levels": 0}, "--levels 0: give 1 to 8"),
    ({"levels": 3}, "--res 64: give a multiple of 128 at --factor 16 --levels 3"),
    ({"validate_every": 5}, "--validate-every: give --validate DIR"),
    ({"validate": "x", "validate_every": 0}, "--validate-every 0: give 1 or more"),
    ({"huber": 1e-30}, "--huber 1e-30: give 0 for the squared error, or 0.0001 to 10,000"),
    ({"bands": "1,1,1,1e30"}, "--bands 1,1,1,1e+30: give weights of at most 1,000,000"),
    ({"bands": "0,0,0,0"}, "at least one above 0"),
    ({"time_shift": 1e10}, "--time-shift 10000000000.0: give 0.001 to 1,000"),
    ({"guidance": -1.0}, "--guidance -1.0: give a number from 0")])
def test_levels_and_intervals_out_of_range_are_refused(settings, changed, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        check(settings(**changed), 1)


@pytest.mark.parametrize("flags, words", [
    (["--bands", "1,1,x,1"], "four numbers from 0"), (["--time-shift", "three"], '0.001 to 1,000, or "tokens"'),
    (["--huber-snr", "1,0.2,0.5,5,0"], "five numbers from 0 for c_min,c_max,a,g,b, 0 < c_min <= c_max, g > 0"),
    (["--beta", "0,4"], "two integers from 0 for A,B, at least 1"), (["--beta", "2.5,4"], "two integers"),
    (["--sigma-range", "0.6,0.5"], "two numbers from 0 for LOW,HIGH, LOW < HIGH <= 1"),
    (["--sigma-range", "0,2"], "LOW < HIGH <= 1"), (["--guidance", "4,1"], "LOW,HIGH, LOW < HIGH"),
    (["--guidance", "strong"], "a number, or LOW,HIGH")])
def test_flag_that_is_no_number_is_refused_in_words(flags, words, capsys):
    with pytest.raises(SystemExit):
        parse(flags)
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_settings_are_frozen(settings):
    with pytest.raises(AttributeError):
        settings().res = 32


@pytest.mark.parametrize("flags", [["--pla", "8x80"], ["--see=1"]])
def test_flags_are_not_abbreviated(flags, capsys):
    with pytest.raises(SystemExit):
        parse(flags)
    assert "unrecognized arguments" in capsys.readouterr().err


def test_dtype_follows_the_device_that_is_given(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [parse(["--data=x", *flags]).dtype for flags in ((), ("--device=cuda:1",), ("--device=cpu",))] == [
        "bf16", "bf16", "fp32"]


def test_plan_is_for_gpus_on_any_machine():
    s = parse(["--model=flux", "--plan=8x80"])
    assert (s.device, s.dtype, s.plan, s.model) == ("cuda", "bf16", Machine(8, 80 * GIB), "flux")
    assert parse(["--model=flux", "--plan=2x80:512.5"]).plan == Machine(2, 80 * GIB, round(512.5 * GIB))


@pytest.mark.parametrize("text", ["8", "x80", "0x80", "8x", "8xmany", "8x80:", "8x80:much"])
def test_machine_is_ranks_times_gigabytes(text, capsys):
    with pytest.raises(SystemExit):
        parse([f"--plan={text}"])
    assert "RANKSxGB, such as 8x80" in capsys.readouterr().err
