"""Flags and presets: what the command line makes of them, and the help that shows them."""
import dataclasses
import re

import pytest
import torch

import settings
import train
from settings import Settings, parse
from support.console import InputError


def test_without_a_gpu_the_cpu_preset_is_taken_and_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    s, _ = parse(["--data", "mvtec", "--category", "cable"])
    assert s.preset == "cpu" and "no GPU" in capsys.readouterr().out
    s, _ = parse(["--data", "mvtec", "--category", "cable", "--preset", "paper"])
    assert (s.T, s.resize, s.crop, s.batch, s.lr, s.epochs, s.lr_drop) == (20, 256, 224, 8, 1e-5,
                                                                         1500, 800)
    parse(["--data", "mvtec", "--category", "cable", "--resume"])     # the folder says the preset
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("preset, flags, crop", [
    ("cpu", [], 96), ("cpu", ["--resize", "256"], 256), ("quick", ["--resize", "64"], 64),
    ("authors", ["--resize", "320"], 320), ("cpu", ["--resize", "256", "--crop", "224"], 224),
    ("paper", ["--resize", "512"], 448), ("paper", ["--resize", "288"], 248),
    ("paper", ["--resize", "288", "--crop", "224"], 224)])
def test_another_size_leaves_out_the_same_share(preset, flags, crop):
    assert parse(["--preset", preset, *flags])[0].crop == crop


def test_the_last_mask_is_m_1_unless_fewer_steps_are_asked_for():
    last = ["--preset", "cpu", "--final-mask", "last"]
    assert parse(["--preset", "cpu"])[0].infer_steps == 3
    assert parse(last)[0].infer_steps == 0
    assert parse([*last, "--infer-steps", "5"])[0].infer_steps == 5


def test_paper_and_authors_compute_in_float32(monkeypatch):
    monkeypatch.setattr(settings, "fast_bf16", lambda device: True)
    precisions = {preset: parse(["--preset", preset])[0].precision for preset in settings.PRESETS}
    assert precisions == {"paper": "float32", "authors": "float32", "fast": "bf16", "cpu": "bf16",
                          "quick": "bf16"}
    assert parse(["--preset", "paper", "--precision", "bf16"])[0].precision == "bf16"


def test_the_authors_preset_turns_as_their_code_does():
    presets = {preset: parse(["--preset", preset])[0] for preset in settings.PRESETS}
    assert {k: (s.rotation, s.authors_rotation) for k, s in presets.items()} == {
        "paper": (90, False), "authors": (20, True), "fast": (90, False), "cpu": (90, False),
        "quick": (10, False)}


def test_the_fast_preset_is_the_papers_network_and_size_trained_as_the_cpu_preset_trains():
    paper, fast, cpu = (parse(["--preset", name])[0] for name in ("paper", "fast", "cpu"))
    for name in ("resize", "crop", "channels", "batch", "T", "pe", "rotation", "lam", "kernel"):
        assert getattr(fast, name) == getattr(paper, name), name
    for name in ("grow", "anomalous", "init", "attention_norm", "lr_schedule", "muon", "clip",
                 "hold_out"):
        assert getattr(fast, name) == getattr(cpu, name), name
    with pytest.raises(InputError, match="--preset fast: --method draem has "):
        parse(["--preset", "fast", "--method", "draem"])


def test_other_methods_keep_batches_of_one_size_half_of_them_anomalous_and_adamw():
    ours, theirs = (parse(["--preset", "quick", "--method", method])[0]
                    for method in ("transfusion", "draem"))
    alone = ("grow", "anomalous", "muon", "time_after_norm")
    assert [getattr(ours, name) for name in alone] == ["0.6:0.6", 0.75, True, True]
    assert [getattr(theirs, name) for name in alone] == ["", 0.5, False, False]
    for flags in (["--grow", "0.5:0.5"], ["--anomalous", "0.75"], ["--time-after-norm"]):
        with pytest.raises(InputError, match="means nothing to --method draem"):
            parse(["--method", "draem", *flags])
    assert parse(["--method", "draem", "--muon"])[0].muon           # may be tried with any method


def test_growing_sides_are_multiples_of_8_with_the_shares_at_which_they_end():
    assert settings.growing_sides(Settings(crop=96)) == []
    assert settings.growing_sides(Settings(crop=96, grow="0.05:0.5")) == [(16, 0.5)]   # for SSIM
    assert settings.growing_sides(Settings(crop=96, grow="0.6:0.5,0.8:0.75")) == [(56, 0.5),
                                                                                 (80, 0.75)]


@pytest.mark.parametrize("grow", ["0.5", "48:0.5", "0.5:half", "0.5:1", "0:0.5", "0.5:0.5,0.4:0.6",
                                  "0.5:0.5,0.6:0.4", "0.5:0.5,", "nan:0.5", "0.0:0.5"])
def test_growing_sides_of_another_form_are_refused(grow):
    with pytest.raises(InputError, match=f"--grow {re.escape(grow)}: "):
        settings.growing_sides(Settings(grow=grow))


def test_epochs_beat_the_steps_of_a_preset():
    assert parse(["--preset", "quick"])[0].steps == 1200
    assert parse(["--preset", "quick", "--epochs", "5"])[0].steps == 0


def test_the_flags_that_were_typed_are_known_and_only_these():
    _, flags = parse(["--category", "gear", "--no-pe", "--eval-every", "3", "--resume"])
    assert flags.typed == {"category", "pe"} and flags.eval_every == 3 and flags.resume
    _, flags = parse([])                            # the demo's category and preset are not typed
    assert flags.typed == set() and flags.eval_every == 0 and not flags.resume


def test_help_shows_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for f in dataclasses.fields(Settings):
        assert "--" + f.name.replace("_", "-") in out
