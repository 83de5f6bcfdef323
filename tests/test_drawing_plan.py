"""sample.py --plan: bytes by shapes, the fastest way that fits, and what a run then does."""

import re

import pytest
import torch

import sample
from drawing import plan as plans
from drawing.plan import parameters_of
from family import PUBLISHED
from layers import blocks_of
from machine.memory import GIB

GB = 1e9


def plan_for(*arguments) -> plans.Plan:
    return sample.prepared(sample.parse(["--plan", *map(str, arguments)])).plan


def size(plan: plans.Plan, *names: str) -> int:
    return sum(rows[name] for rows in [dict(plan.rows)] for name in names if name in rows)


@pytest.mark.parametrize("model, store, most", [("flux", (), 17.6), ("flux", ("--store", "fp8"), 9.0),
                                                ("sd3", (), 3.0), ("sd3.5-large", (), 11.0)])
def test_weights_that_stay_in_the_loop_are_without_modulations(model, store, most):
    plan = plan_for("--model", model, "--res", 4096, "--memory", 80, *store)
    assert size(plan, "latent: resident weights") <= most * GB and plan.resident is None and plan.stays


def test_bytes_are_those_of_the_tensors_of_a_streamed_model():
    job = sample.prepared(sample.parse(["--memory", "4", "--prompt", "x"]))
    model = sample.models_of(job).transformer()
    there = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert size(job.plan, "latent: resident weights") == there
    model.pos_embed = None
    assert sum(of_all for _, of_all in parameters_of(job.family, job.config)[1]) * 4 == sum(
        p.nbytes for block in blocks_of(model) for p in block.parameters())


def test_less_memory_costs_more_time_step_by_step():
    """All beside each other; then phase by phase and in two passes; then streamed, ever fewer blocks resident."""
    ways = [plan_for("--model", "sd3.5-large", "--res", 4096, "--memory", memory) for memory in (24, 12, 8, 6, 4.5)]
    assert all(way.most <= way.memory for way in ways)
    assert [(way.stays, way.batched) for way in ways] == [(True, True), (False, False), *[(False, True)] * 3]
    residents = [way.blocks if way.resident is None else way.resident for way in ways]
    assert residents == sorted(residents, reverse=True) and residents[:2] == [38, 38] and residents[-1] < residents[2]


def test_flux_at_4096_px_fits_a_card_of_24_gb_resident_of_12_in_fp8_and_of_8_streamed():
    for memory, store in ((23, ()), (11, ("--store", "fp8"))):
        plan = plan_for("--model", "flux", "--res", 4096, "--memory", memory, *store)
        assert plan.resident is None and plan.most <= memory * GIB
    plan = plan_for("--model", "flux", "--res", 4096, "--memory", 7)
    assert plan.most <= 7 * GIB and 0 < plan.resident < 57 and not plan.stays


def test_where_the_transformer_stays_each_phase_counts_what_the_other_model_keeps():
    plan = plan_for("--model", "flux", "--res", 1024, "--memory", 80, "--steps", 1000)
    rows = dict(plan.rows)
    sampling = sum(size for name, size in rows.items() if name.startswith("latent"))
    decoding = sum(size for name, size in rows.items() if name.startswith("picture"))
    assert plan.stays and rows["latent: modulations of all steps"] > 1.9 * GIB
    assert plan.most == max(sampling + rows["picture: VAE weights"], sampling - rows["latent: activations"] + decoding)


def test_texts_of_a_list_of_prompts_are_counted():
    one, many = (plan_for("--model", "flux", "--memory", 80, *given)
                 for given in (("--prompt", "x"), ("--prompts", "list.txt")))
    rows = 255 * 512 * 4096 * 2  # of 256 prompts and the negative one, instead of two
    assert size(many, "text: encoders") - size(one, "text: encoders") == 2 * rows


def test_memory_that_cannot_suffice_is_refused_before_a_weight_is_read():
    with pytest.raises(SystemExit, match="--memory 0.01: --res 4096 takes at least .* GiB"):
        sample.main(["--prompt", "x", "--res", "4096", "--memory", "0.01"])
    for given in ("none", "0", "-3", "8TB"):
        with pytest.raises(SystemExit, match="--memory.*GiB, such as 8"):
            sample.main(["--prompt", "x", "--memory", given])


@pytest.mark.parametrize("flag", ["--transformer", "--vae", "--lora"])
def test_a_plan_of_a_published_model_does_not_pass_over_a_file_that_is_given(flag):
    with pytest.raises(SystemExit, match="flux: no such folder"):
        sample.main(["--plan", "--model", "flux", flag, "nowhere.safetensors"])


@pytest.mark.parametrize("model", list(PUBLISHED))
def test_published_models_are_planned_without_files(model, capsys):
    sample.main(["--plan", "--model", model, "--res", "1024", "--memory", "24"])
    printed = capsys.readouterr().out
    assert "picture: decoding" in printed and "fit into 24.00 GiB" in printed


def test_a_plan_that_does_not_fit_is_an_answer_and_no_error_as_of_train_py(capsys):
    sample.main("--plan --model tiny-flux --res 256 --memory 0.01".split())
    assert re.search(r"GiB do not fit into 0.01 GiB$", capsys.readouterr().out)


def test_a_streamed_run_draws_the_resident_picture(tmp_path):
    pictures = []
    for name, memory in (("all", ()), ("little", ("--memory", "0.075"))):
        sample.main(["--prompt", "a hill", "--model", "tiny-flux", "--res", "256", "--first", "none", "--steps", "2",
                     "--device", "cpu", "--out", str(tmp_path / f"{name}.png"), *memory])
        pictures.append((tmp_path / f"{name}.png").read_bytes())
    assert pictures[0] == pictures[1]


def test_planned_activations_are_those_of_the_run(monkeypatch):
    """Live bytes counted on real tensors, with a streamed model, against those of the plan."""
    from machine.memory import LiveBytes

    job = sample.prepared(sample.parse(["--model", "tiny-flux", "--prompt", "x", "--memory", "4", "--res", "512",
                                        "--first", "none", "--device", "cpu"]))
    model, config = sample.models_of(job).transformer(), job.config
    latent, text = torch.randn(1, 16, 32, 32), torch.randn(1, job.family.text_tokens(job.settings.t5_length),
                                                           config.context_dim)
    with torch.inference_mode():
        numbers = sample.hoist(model, torch.ones(1), torch.randn(1, config.pooled_dim), torch.ones(1))
    with torch.no_grad(), LiveBytes(model) as live:
        model(latent, torch.ones(1), text, numbers, torch.ones(1))
    assert size(job.plan, "latent: activations") == pytest.approx(live.peak, rel=0.1)
