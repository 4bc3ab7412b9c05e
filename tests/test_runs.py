"""A run and its folder: what a checkpoint keeps, which settings fit a folder, older checkpoints."""
import dataclasses
import json

import pytest
import torch

import evaluate
import runs
import train
from helpers import argv_for, moments_of, refused, run_of
from runs import Run, build_model, new_run, refuse_other_settings, resumed_settings
from settings import LENGTH, Settings, fields_of, names_of
from support.console import InputError
from support.files import save_json

SAVED = Settings(data="/old/parts", category="bolt", preset="quick", lr=5e-4, steps=100,
                 precision="bf16", root="/old", device="cuda", checkpoint_every=200, recompute=True,
                 hold_out=0.2)


@pytest.fixture
def folder(tmp_path):
    """A run folder that holds nothing but the settings SAVED."""
    save_json(tmp_path / "config.json", dataclasses.asdict(SAVED))
    return tmp_path


def other_value(f: dataclasses.Field):
    """A value that SAVED does not have in this field."""
    value = getattr(SAVED, f.name)
    if f.name == "device":
        return "cpu"
    return {bool: lambda: not value, str: lambda: value + "x"}.get(f.type, lambda: value + 1)()


# ---------------------------------------------------------------- what a checkpoint keeps

@pytest.mark.parametrize("muon", [False, True])
def test_a_checkpoint_keeps_the_whole_record_of_a_run(muon, tmp_path):
    """What is saved is what another process loads."""
    s = Settings(resize=32, crop=32, channels=8, T=2, device="cpu", ema=0.9, steps=100, muon=muon)
    one = runs.new_run(tmp_path, s, None, runs.build_model(s))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    M = (x[:, :1] > 0.5).float()
    one.model.losses(x, x * M, M, M, torch.tensor([1, 2]))["loss"].backward()
    one.optimizer.step()
    one.average.update_parameters(one.model)
    record = dict(step=7, seconds=1.5, rollbacks=2, outliers=1,
                  running_mean={"loss": 0.5, "gradient": 2.0, "steps": 7},
                  epoch_steps=[{"loss": 0.4, "gradient": 1.0}],
                  log=[{"epoch": 1, "step": 6}], evaluations=[{"epoch": 1, "aupro": 0.5}],
                  calibration=dict(held_out=[0.1], training=[0.3], synthetic=[], infer_steps=2),
                  user_calibration=dict(held_out=[0.2], training=[], synthetic=[], infer_steps=2))
    assert set(record) == set(Run.RECORD)
    for name, value in record.items():
        setattr(one, name, value)
    one.save()
    other = runs.new_run(tmp_path, s, None, runs.build_model(dataclasses.replace(s, seed=1)))
    other.load()
    assert {name: getattr(other, name) for name in Run.RECORD} == record
    for a, b in ((one.model, other.model), (one.average.module, other.average.module)):
        b = b.state_dict()
        assert all(torch.equal(value, b[name]) for name, value in a.state_dict().items())
    assert int(other.average.n_averaged) == 7
    one_moments, moments = (moments_of(run.optimizer.state_dict()) for run in (one, other))
    assert len(moments) == len(one_moments) > 0 and all(map(torch.equal, moments, one_moments))
    assert (tmp_path / "log.csv").read_text() == "epoch,step\n1,6\n"


# ---------------------------------------------------------------- the settings of a folder

def test_a_setting_that_a_run_is_older_than_had_its_default(tmp_path):
    config = dataclasses.asdict(Settings())
    del config["light"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    refuse_other_settings(tmp_path, Settings(), set())
    with pytest.raises(InputError, match="light 0.0 there, 0.15 here"):
        refuse_other_settings(tmp_path, Settings(light=0.15), set())


@pytest.mark.parametrize("f", fields_of(), ids=lambda f: f.name)
def test_a_folder_refuses_any_setting_that_changes_results(f, folder):
    s = dataclasses.replace(SAVED, **{f.name: other_value(f)})
    if f.name in names_of("machine") | {"data"}:         # data: its files are compared instead
        refuse_other_settings(folder, s, {f.name})
        return
    expected = "--resume trains it to this command's length" if f.name in LENGTH else \
        f"other settings .{f.name} .* there, .* here.; give this one a --name"
    with pytest.raises(InputError, match=expected):
        refuse_other_settings(folder, s, {f.name})
    if f.name == "precision":                            # not typed: what this machine is fast in
        refuse_other_settings(folder, s, set())


@pytest.mark.parametrize("f", fields_of(), ids=lambda f: f.name)
def test_resume_refuses_a_flag_that_was_typed_with_another_value(f, folder, monkeypatch):
    monkeypatch.setattr(runs, "fast_bf16", lambda device: True)
    s = dataclasses.replace(SAVED, **{f.name: other_value(f)})
    if f.name in names_of("machine") | LENGTH | {"data"}:
        assert resumed_settings(folder, s, {f.name}) == s
        return
    value = getattr(SAVED, f.name)
    with pytest.raises(InputError) as caught:
        resumed_settings(folder, s, {f.name})
    message = str(caught.value)
    assert message.startswith(f"--{f.name.replace('_', '-')}: {f.name} {value} there, "
                              f"{other_value(f)} here; ") and "\n" not in message
    assert str(folder) in message and "--name" in message
    assert resumed_settings(folder, s, set()) == SAVED              # not typed: a preset's value
    assert resumed_settings(folder, SAVED, {f.name}) == SAVED       # typed, but the same value


def test_resume_takes_the_folders_settings_but_for_the_machine(folder, monkeypatch, capsys):
    """A command line that only names the run, on a machine whose preset is another one."""
    monkeypatch.setattr(runs, "fast_bf16", lambda device: True)
    s = Settings(data="/new/parts", category="bolt", preset="cpu", lr=1e-3, steps=4400,
                 root="/new", device="cpu", precision="float32", memory_gb=1.0)
    expected = dataclasses.replace(SAVED, data="/new/parts", device="cpu", memory_gb=1.0)
    assert resumed_settings(folder, s, {"data", "category"}) == expected
    assert resumed_settings(folder, s, {"steps"}) == dataclasses.replace(expected, steps=4400)
    epochs = dataclasses.replace(s, steps=0, epochs=7)
    assert resumed_settings(folder, epochs, {"epochs"}) == dataclasses.replace(expected, steps=0,
                                                                               epochs=7)
    assert resumed_settings(folder, s, {"root", "checkpoint_every", "recompute"}) \
        == dataclasses.replace(expected, root="/new", checkpoint_every=1000, recompute=False)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(runs, "fast_bf16", lambda device: False)
    assert resumed_settings(folder, s, set()) == dataclasses.replace(expected, precision="float32")
    assert capsys.readouterr().out == "  continues in float32; the run was begun in bf16\n"


# ---------------------------------------------------------------- older checkpoints

@pytest.mark.network
def test_an_older_checkpoint_loads_as_what_it_was(parts, capsys):
    argv = argv_for(parts, "--no-attention-norm", "--name", "old", "--steps", "9",
                    "--checkpoint-every", "3")
    assert train.main(argv) == 0
    path = run_of(parts, "old") / "last.pt"
    evaluation = [str(path.parent), "--device", "cpu"]
    before = json.loads((path.parent / "metrics.json").read_text())
    state = torch.load(path, weights_only=True)
    for key in ("epoch_steps", "running_mean", "outliers", "rollbacks", "user_calibration"):
        del state[key]
    calibration, state["eval"] = state.pop("calibration"), state.pop("evaluations")
    # The names of format 3, then what format 2 had in place of the record.
    state["normal"] = {"images": calibration["held_out"], "trained": calibration["training"],
                       "synthetic": calibration["synthetic"],
                       "infer_steps": calibration["infer_steps"]}
    state["calibrated"] = {"images": [0.1, 0.2], "infer_steps": 2}
    torch.save({**state, "format": 2, "sums": {}, "usual": {}, "high": 0, "returns": 0}, path)
    _, converted = runs.load_checkpoint(path)
    assert converted["calibration"] == calibration
    assert converted["user_calibration"] == {"held_out": [0.1, 0.2], "training": [],
                                             "synthetic": [], "infer_steps": 2}
    assert evaluate.main(evaluation) == 0
    after = json.loads((path.parent / "metrics.json").read_text())
    assert {k: v for k, v in after.items() if k != "seconds_per_image"} \
        == {k: v for k, v in before.items() if k != "seconds_per_image"}
    path.with_name("metrics.json").unlink()                         # as if it had not ended
    for flags in ([], ["--resume"]):
        refused(capsys, [*argv, *flags], "was begun by an earlier version, which alone can "
                "continue it", "--name")
    del state["settings"]["attention_norm"], state["settings"]["time_after_norm"]
    state["settings"]["attention_lr"] = 0.1
    del state["normal"], state["calibrated"]
    torch.save({**state, "format": 1}, path)
    model, s, converted = runs.load_model(path, torch.device("cpu"))
    assert not s.time_after_norm
    assert not s.attention_norm and isinstance(model.net.middle.attn.norm, torch.nn.Identity)
    assert not converted["calibration"] and not converted["user_calibration"]
    refused(capsys, [*argv, "--resume"], "was begun by an earlier version", "--name")
    assert dataclasses.asdict(s)["steps"] == 9


def test_a_checkpoint_that_an_outlier_delays_is_due_until_it_is_saved(tmp_path):
    s = Settings(channels=8, T=2, steps=100, checkpoint_every=10, device="cpu")
    run = new_run(tmp_path, s, None, build_model(s))
    due = []
    for run.step in (9, 10, 11, 13):
        due.append(run.is_checkpoint_due)
    run.save()
    for run.step in (14, 19, 20):
        due.append(run.is_checkpoint_due)
    assert due == [False, True, True, True, False, False, True]
    run.load()
    assert run.step == 13 and not run.is_checkpoint_due
