"""The settings of a run: defaults of recipe and family, which of them identify a run, refusals."""

from dataclasses import fields

import pytest

from family import FLUX_DEV, FLUX_SCHNELL, SD3
from training.settings import GIB, IDENTITY, Machine, Settings, parse, settle

MAY_CHANGE = {"data", "out", "recipe", "steps", "shard", "offload", "accumulate", "activations", "ema_on_host",
              "device", "save_dtype", "save_every", "keep", "log_every", "sample_every", "threads", "export", "plan",
              "dry_run"}


def test_every_setting_either_identifies_a_run_or_may_change():
    names = {field.name for field in fields(Settings)}
    assert names == set(IDENTITY) | MAY_CHANGE and not MAY_CHANGE & set(IDENTITY)


def test_recipe_sets_what_the_flags_leave_open_and_single_flags_override_it(settings):
    release, chosen = {"recipe": "release"}, {}
    mixed = release | {"objective": "noise", "flip": True}
    for name, changed in (("ours", {}), ("release", release), ("mixed", mixed)):
        s = settle(settings(**changed), SD3)
        chosen[name] = (s.objective, s.dilation, s.latent_shift, s.flip, s.t5_length, s.density, s.time_shift)
    assert chosen["ours"] == ("paper", 2, True, True, None, "logit_normal", 3.0)
    assert chosen["release"] == ("release", 1, False, False, 77, "logit_normal", 3.0)
    assert chosen["mixed"] == ("noise", 1, False, True, 77, "logit_normal", 3.0)


def test_family_decides_what_the_flags_leave_open(settings):
    dev, schnell = settle(settings(recipe="release"), FLUX_DEV), settle(settings(), FLUX_SCHNELL)
    assert (dev.density, dev.time_shift, dev.guidance, dev.latent_shift) == ("uniform", 1.0, 3.5, True)
    assert schnell.guidance is None
    by_tokens = settle(settings(time_shift="tokens", res=1024), FLUX_DEV)
    assert by_tokens.time_shift == pytest.approx(1.878, abs=1e-3)  # exp(0.63)
    assert settle(settings(res=4096), SD3).activations == "recompute" and settle(settings(), SD3).activations == "keep"


def test_settings_are_frozen(settings):
    with pytest.raises(AttributeError):
        settings().res = 32


@pytest.mark.parametrize("flags", [["--pla", "8x80"], ["--see=1"]])
def test_flags_are_not_abbreviated(flags, capsys):
    with pytest.raises(SystemExit):
        parse(flags)
    assert "unrecognized arguments" in capsys.readouterr().err


def test_plan_is_for_gpus_on_any_machine():
    s = parse(["--model=flux", "--plan=8x80"])
    assert (s.device, s.dtype, s.plan, s.model) == ("cuda", "bf16", Machine(8, 80 * GIB), "flux")


@pytest.mark.parametrize("text", ["8", "x80", "0x80", "8x", "8xmany"])
def test_machine_is_ranks_times_gigabytes(text, capsys):
    with pytest.raises(SystemExit):
        parse([f"--plan={text}"])
    assert "RANKSxGB, such as 8x80" in capsys.readouterr().err
